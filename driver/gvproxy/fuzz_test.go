package gvproxy

import (
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
)

// Whatever a guest says, only TCP and UDP forwards to itself come or go.
func FuzzInside(f *testing.F) {
	for _, body := range []string{
		`{"local":"127.0.0.1:8080","remote":":8080","protocol":"tcp"}`,
		`{"local":":8080","protocol":"tcp"}`,
		`{"local":"/run/podman.sock","remote":"tcp://192.168.127.2:80","protocol":"unix"}`,
		`{"local":"/run/podman.sock","protocol":"unix"}`,
		`{"local":":1","remote":"[::ffff:192.168.127.2]:1"}`, `{"local":":1","remote":"192.168.127.3:1"}`, `null`, `[]`, ``,
	} {
		f.Add(body, "192.168.127.2:5000")
		f.Add(body, "[fe80::1%eth0]:5000")
	}
	f.Fuzz(func(t *testing.T, body, from string) {
		fixed := []Forward{
			forward(t, TCP, ":8080", "192.168.127.99:80"),
			forward(t, Unix, "/run/podman.sock", "ssh-tunnel://core@192.168.127.2:22/run/podman.sock?key=/k"),
		}
		self, _ := netip.ParseAddrPort(from)
		if plain(self.Addr()) == fixed[0].Target.Addr() {
			return
		}
		g := newFake(fixed...)
		for _, path := range []string{exposePath, unexposePath, allPath} {
			req := httptest.NewRequestWithContext(t.Context(), "POST", path, strings.NewReader(body))
			req.RemoteAddr = from
			w := httptest.NewRecorder()
			Inside(g).ServeHTTP(w, req)
			switch w.Code {
			case 200, 400, 403, 500:
			default:
				t.Errorf("%s: status %d", path, w.Code)
			}
			if strings.Contains(w.Body.String(), "key=/k") && !strings.Contains(body, "key=/k") {
				t.Errorf("%s: a guest sees %s", path, w.Body)
			}
			kept := 0
			for _, got := range g.Forwards() {
				if got.Key == fixed[0].Key || got.Key == fixed[1].Key {
					kept++
				} else if !guests(got, plain(self.Addr())) || got.SSH != nil {
					t.Errorf("%s made %+v", path, got)
				}
			}
			if kept != len(fixed) {
				t.Errorf("%s took another's forward", path)
			}
		}
	})
}

// On the host all paths survive all bodies, and what was taken is shown again as JSON that is taken again.
func FuzzServices(f *testing.F) {
	for _, body := range []string{
		`{"Name":"crc.testing.","Records":[{"Name":"a","IP":"1.2.3.4"},{"Regexp":"^b.*"}],"DefaultIP":"4.3.2.1"}`,
		`{"local":":1","remote":"ssh-tunnel://u@[fd00::2]/p?key=k","protocol":"unix"}`, `{"Name":1}`, `{"Records":[{}]}`, `{`,
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		g := newFake()
		h := Services(g, slog.New(slog.DiscardHandler))
		do := func(path, body string) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "POST", path, strings.NewReader(body)))
			return w
		}
		for _, path := range []string{exposePath, unexposePath, addPath} {
			if w := do(path, body); w.Code != 200 && w.Code != 400 && w.Code != 500 {
				t.Errorf("%s: status %d", path, w.Code)
			}
		}
		do(exposePath, body)
		for _, path := range []string{allPath, zonesPath} {
			if w := do(path, ""); w.Code != 200 || w.Body.Len() < len("[]\n") {
				t.Errorf("%s: %d %q", path, w.Code, w.Body)
			}
		}
		shown := strings.TrimSuffix(strings.TrimPrefix(do(zonesPath, "").Body.String(), "["), "]\n")
		if shown == "null\n" {
			return
		}
		if w := do(addPath, shown); w.Code != 200 {
			t.Errorf("%s is not taken again: %s", shown, w.Body)
		}
	})
}

func FuzzParseForward(f *testing.F) {
	f.Add("tcp", ":80", "192.168.127.2:80")
	f.Add("udp", ":80", "[fd00::2%eth0]:80")
	f.Add("unix", "/x", "ssh-tunnel://u:p@192.168.127.2:22/path?key=/k&passphrase=x")
	f.Add("npipe", "npipe:////./pipe/x", "tcp://[::ffff:1.2.3.4]:80")
	f.Fuzz(func(t *testing.T, proto, local, remote string) {
		fwd, err := ParseForward(Proto(proto), local, remote)
		if err != nil {
			return
		}
		if !fwd.Target.IsValid() || fwd.Target.Addr() != plain(fwd.Target.Addr()) {
			t.Errorf("target %s", fwd.Target)
		}
		if fwd.SSH != nil && (fwd.SSH.Path == "" || fwd.SSH.KeyFile == "") {
			t.Errorf("ssh %+v", fwd.SSH)
		}
		if fwd.Key != (Key{Proto(proto), local}) || fwd.Remote != remote {
			t.Errorf("forward %+v", fwd)
		}
	})
}

// A tunnel leads to an address and a port, or nowhere.
func FuzzTunnel(f *testing.F) {
	f.Add("ip=192.168.127.2&port=22")
	f.Add("ip=%3a%3affff:1.2.3.4&port=+1")
	f.Add("ip=fe80::1%25eth0&port=65536&ip=1.2.3.4")
	h := Services(newFake(), slog.New(slog.DiscardHandler))
	f.Fuzz(func(t *testing.T, query string) {
		req := httptest.NewRequestWithContext(t.Context(), "POST", "/tunnel", strings.NewReader(""))
		req.URL.RawQuery = query
		w := httptest.NewRecorder() // of which no connection can be had
		if h.ServeHTTP(w, req); w.Code != 500 {
			t.Errorf("status %d", w.Code)
		}
		values := req.URL.Query()
		to, err := addrPort(values.Get("ip"), values.Get("port"))
		if err == nil && (!to.IsValid() || to.Addr() != plain(to.Addr())) {
			t.Errorf("%q leads to %s", query, to)
		}
	})
}
