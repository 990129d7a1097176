package oci_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// refused: what cannot be obeyed stops the container, and says why.
func refused(r *rig) {
	for _, tt := range []struct {
		annotations map[string]string
		want        string
	}{
		{map[string]string{"netwrok": "web"}, "unknown; known are"},
		{map[string]string{"network": "../x"}, "want a name of letters and digits"},
		{map[string]string{"publish": "80:http"}, `80:http`},
		{map[string]string{"ip": "fd00::1"}, "want an address"},
		{map[string]string{"ip": "10.99.0.9", "subnet": "10.98.0.0/24"}, "in none of the network's subnets"},
		{map[string]string{"mac": "01:00:5e:00:00:01"}, "want the six bytes of one station"},
		{map[string]string{"interface": "much/too/long/for/it"}, "interface name"},
		{map[string]string{"internal": "perhaps"}, "want true or false"},
		{map[string]string{"mode": "magic"}, "want usermode or bridge"},
		{map[string]string{"mtu": "12"}, "want a number of bytes"},
		{map[string]string{"masquerade": "true"}, "it needs mode=bridge"},
		{map[string]string{"dns": "localhost"}, "want an address"},
		{map[string]string{"resolv_conf": "maybe"}, "want auto, on or off"},
	} {
		err := r.tryRun(container{name: "wrong", annotations: tt.annotations})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			r.Errorf("%v: %v, want %q", tt.annotations, err, tt.want)
		}
		if err == nil {
			r.end("wrong")
		}
	}
}

// badState: whatever comes on standard input, the hook says what is wrong with it and does nothing.
func badState(r *rig) {
	r.run(container{name: "www", annotations: map[string]string{"publish": "8080:80"}})
	r.page(r.h.NS(), "127.0.0.1:8080", "hello from www")
	before := r.snapshot()
	huge := `{"ociVersion": "1.0.2", "id": "x", "status": "creating", "pid": 1, "annotations": {"a": "` + strings.Repeat("x", 2<<20) + `"}}`
	for _, tt := range []struct{ state, want string }{
		{"", "there is none on standard input"},
		{"null", "it has no id"},
		{"[]", "cannot unmarshal"},
		{`{"id": "x"`, "unexpected end"},
		{`{"id": "x", "status": "creating", "pid": 1} {}`, "after top-level value"},
		{huge, "more than 1048576 bytes"},
		{`{"id": "x", "status": "sleeping", "pid": 1, "bundle": "/"}`, `status "sleeping"`},
		{`{"id": "x", "status": "creating", "bundle": "/"}`, "has no pid"},
		{`{"id": "x", "status": "creating", "pid": -1, "bundle": "/"}`, "pid -1"},
		{`{"id": "x", "status": "creating", "pid": 1, "bundle": "b"}`, "want an absolute path"},
		{`{"id": "x", "status": "creating", "pid": 1, "bundle": "/nowhere"}`, "/nowhere/config.json"},
		{fmt.Sprintf(`{"id": "x", "status": "creating", "pid": 1, "bundle": %q}`, r.dir("www")), "the hook runs in its network namespace"},
		{fmt.Sprintf(`{"id": "x", "status": "creating", "pid": 4000000, "bundle": %q}`, r.dir("www")), "no such file or directory"},
	} {
		err := r.h.Feed(r.Context(), tt.state, r.usernetBin(), "oci-hook")
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			r.Errorf("%.80s: %v, want %q", tt.state, err, tt.want)
		}
	}
	broken := filepath.Join(r.h.Dir, "broken")
	if err := os.MkdirAll(broken, 0o755); err != nil {
		r.Fatal(err)
	}
	for _, text := range []string{"", "{", "[]", `{"linux": {"namespaces": 7}}`} {
		if err := os.WriteFile(filepath.Join(broken, "config.json"), []byte(text), 0o644); err != nil {
			r.Fatal(err)
		}
		state := fmt.Sprintf(`{"id": "x", "status": "creating", "pid": %d, "bundle": %q}`, r.pid("www"), broken)
		err := r.h.Feed(r.Context(), state, r.usernetBin(), "oci-hook")
		if err == nil || !strings.Contains(err.Error(), "config.json") {
			r.Errorf("configuration %q: %v", text, err)
		}
	}
	if err := before.Same(r.snapshot()); err != nil {
		r.Error(err)
	}
}
