package ocihook

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/usernet/usernet"
)

func TestDecodeState(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       state // without an ID: refused
		ended      bool
	}{
		{
			name: "runc, createRuntime",
			text: `{"ociVersion": "1.0.2", "id": "web", "status": "creating", "pid": 7, "bundle": "/b", "annotations": {"a": "b"}}`,
			want: state{State: specs.State{Version: "1.0.2", ID: "web", Status: "creating", Pid: 7, Bundle: "/b", Annotations: map[string]string{"a": "b"}}},
		},
		{
			name:  "runc, poststop",
			text:  `{"ociVersion": "1.0.2", "id": "web", "status": "stopped", "bundle": "/b"}`,
			want:  state{State: specs.State{Version: "1.0.2", ID: "web", Status: "stopped", Bundle: "/b"}},
			ended: true,
		},
		{
			name: "before the specification 1.0, prestart",
			text: `{"version": "0.6", "id": "web", "pid": 7, "root": "/r", "bundlePath": "/b"}`,
			want: state{State: specs.State{ID: "web", Pid: 7, Bundle: "/b"}, OldBundle: "/b"},
		},
		{
			name:  "and poststop",
			text:  `{"version": "0.6", "id": "web", "bundlePath": "/b"}`,
			want:  state{State: specs.State{ID: "web", Bundle: "/b"}, OldBundle: "/b"},
			ended: true,
		},
		{
			name: "paused, of runc",
			text: `{"id": "web", "status": "paused", "pid": 7, "bundle": "/b"}`,
			want: state{State: specs.State{ID: "web", Status: "paused", Pid: 7, Bundle: "/b"}},
		},
		{name: "nothing", text: " \n"},
		{name: "no object", text: `"web"`},
		{name: "two objects", text: `{"id": "web"} {"id": "web"}`},
		{name: "no ID", text: `{"status": "stopped"}`},
		{name: "a zero byte", text: `{"id": "a\u0000b", "status": "stopped"}`},
		{name: "a relative bundle", text: `{"id": "web", "status": "stopped", "bundle": "b"}`},
		{name: "no pid", text: `{"id": "web", "status": "running", "bundle": "/b"}`},
		{name: "an unknown status", text: `{"id": "web", "status": "gone", "bundle": "/b"}`},
		{name: "an annotation that is no text", text: `{"id": "web", "status": "stopped", "annotations": {"a": 1}}`},
		{name: "too much", text: `{"id": "web", "status": "stopped", "annotations": {"a": "` + strings.Repeat("x", maxState) + `"}}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeState(strings.NewReader(tt.text))
			if tt.want.ID == "" {
				if err == nil {
					t.Errorf("accepted: %+v", got)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if got.ended() != tt.ended {
				t.Errorf("ended: %t, want %t", got.ended(), tt.ended)
			}
		})
	}
}

// FuzzState reads whatever comes; what it accepts has to be something that can be asked of the daemon.
func FuzzState(f *testing.F) {
	f.Add(`{"id": "x", "status": "creating", "pid": 1, "bundle": "/", "annotations": {"usernet.publish": "1-2:3-4, [::]:5:6/udp", "usernet.ip6": "::1"}}`, `{"hostname": "h"}`)
	f.Add(`{"id": "x", "pid": 1, "bundlePath": "/", "annotations": {"usernet.subnet": "::/1,", "usernet.mac": "0::", "usernet.network": "."}}`, `{"mounts": [{"destination": ".."}]}`)
	f.Add(`{"id": "x", "status": "stopped", "annotations": null}`, `{"linux": {"namespaces": [{"type": "network", "path": ""}]}, "root": null}`)
	f.Fuzz(func(t *testing.T, text, config string) {
		st, err := decodeState(strings.NewReader(text))
		if err != nil {
			return
		}
		var b bundle
		if json.Unmarshal([]byte(config), &b) != nil {
			return
		}
		b.mountsResolver(st.ID)
		st.rootfs(b)
		b.joined()
		s, err := settingsOf(nil, st.Annotations)
		if err != nil {
			return
		}
		w, err := s.wish(st, b)
		if err != nil {
			return
		}
		for _, p := range w.Ports {
			if p.ContainerPort == 0 || p.Proto != usernet.TCP && p.Proto != usernet.UDP && p.Proto != usernet.SCTP {
				t.Errorf("port %+v", p)
			}
		}
		if len(w.ID) != 64 || w.Network.ID == "" || w.Container.ID != st.ID {
			t.Errorf("request %+v", w.AttachRequest)
		}
		if _, err := json.Marshal(w.AttachRequest); err != nil {
			t.Error(err)
		}
	})
}
