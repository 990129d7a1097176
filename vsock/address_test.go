package vsock

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const machine = "0CB41C0B-FD26-4A41-8370-DCCB048E216E"
	for _, tt := range []struct {
		url  string
		want string // what String makes of it; "" if it is the same
		addr Addr   // without the kind
	}{
		{url: "vsock://2:1024", addr: Addr{cid: 2, port: 1024}},
		{url: "vsock://host:1024", want: "vsock://2:1024", addr: Addr{cid: 2, port: 1024}},
		{url: "vsock://local:1024", want: "vsock://1:1024", addr: Addr{cid: 1, port: 1024}},
		{url: "vsock://:1024", addr: Addr{cid: cidAny, port: 1024}},
		{url: "vsock://3:4294967294", addr: Addr{cid: 3, port: 4294967294}},
		{url: "vsock://2:1024/connect", addr: Addr{cid: 2, port: 1024, path: "/connect"}},
		{url: "unix:///run/x.sock", addr: Addr{path: "/run/x.sock"}},
		{url: "unix:///run/a%20b%25.sock", addr: Addr{path: "/run/a b%.sock"}},
		{url: "unix:///c:/run/x.sock", addr: Addr{path: "/c:/run/x.sock"}},
		{url: "hybrid:///run/vm.vsock:52", addr: Addr{path: "/run/vm.vsock", port: 52}},
		{url: "hybrid:///run/10:20/vm:52", addr: Addr{path: "/run/10:20/vm", port: 52}},
		{url: "hyperkit:///Users/me/vm:1024", addr: Addr{path: "/Users/me/vm", port: 1024}},
		{url: "vsock://null:1024/Users/me/vm/", want: "hyperkit:///Users/me/vm:1024", addr: Addr{path: "/Users/me/vm", port: 1024}},
		{url: "tcp://127.0.0.1:80", addr: Addr{host: "127.0.0.1:80"}},
		{url: "tcp://[::1]:0", addr: Addr{host: "[::1]:0"}},
		{url: "tcp://[fe80::1%25eth0]:80", addr: Addr{host: "[fe80::1%eth0]:80"}},
		{url: "tcp://:80", addr: Addr{host: ":80"}},
		{url: "hvsock://wildcard/1024", addr: Addr{service: ServiceGUID(1024)}},
		{url: "hvsock://" + strings.ToLower(machine) + "/" + machine, want: "hvsock://" + machine + "/" + machine,
			addr: Addr{vm: guid(t, machine), service: guid(t, machine)}},
		{url: "hvsock://00000000-0000-0000-0000-000000000000/00000400-facb-11e6-bd58-64006a7986d3", want: "hvsock://wildcard/1024",
			addr: Addr{service: ServiceGUID(1024)}},
		{url: "hvsock://parent/1", addr: Addr{vm: guid(t, "a42e7cda-d03f-480c-9cc2-a4de20abb878"), service: ServiceGUID(1)}},
		{url: "vsock://00000400-FACB-11E6-BD58-64006A7986D3", want: "hvsock://wildcard/1024", addr: Addr{service: ServiceGUID(1024)}},
		{url: "fd:web.socket", addr: Addr{host: "web.socket"}},
		{url: "fd://web.socket", want: "fd:web.socket", addr: Addr{host: "web.socket"}},
		{url: "fd:3", addr: Addr{host: "3"}},
		{url: "fd:", addr: Addr{}},
	} {
		t.Run(tt.url, func(t *testing.T) {
			a, err := Parse(tt.url)
			if err != nil {
				t.Fatal(err)
			}
			want := tt.want
			if want == "" {
				want = tt.url
			}
			if a.String() != want {
				t.Errorf("String %q, want %q", a, want)
			}
			if scheme, _, _ := strings.Cut(want, ":"); a.Scheme() != scheme {
				t.Errorf("scheme %q, want %q", a.Scheme(), scheme)
			}
			a.kind = nil
			if a != tt.addr {
				t.Errorf("address %+v, want %+v", a, tt.addr)
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	for _, tt := range []struct{ url, want string }{
		{"", "the scheme is missing: want vsock://CID:PORT, unix:///PATH"},
		{"/run/x.sock", "the scheme is missing"},
		{"http://127.0.0.1:80", "unknown scheme http: want vsock://CID:PORT"},
		{"firecracker:///run/x:1", "unknown scheme firecracker"},
		{"vsock://2", "the port is missing"},
		{"vsock:2:1024", "want vsock://CID:PORT"},
		{"vsock://2:", `port "": want a number`},
		{"vsock://2:4294967295", `port "4294967295": want a number up to 4294967294`},
		{"vsock://2:x", "invalid port"},
		{"vsock://guest:1024", `CID "guest": want a number, host, local`},
		{"vsock://4294967295:1024", `CID "4294967295"`},
		{"vsock://-1:1024", `CID "-1"`},
		{"vsock://null:1024", "the path is missing"},
		{"vsock://null:1024/", "the path is missing"},
		{"vsock://null::1", "not absolute"},
		{"vsock://me@2:1024", "no place for a user"},
		{"vsock://2:1024?x=y", "no place for a query"},
		{"vsock://2:1024#x", "no place for a fragment"},
		{"unix://run/x.sock", `"run" is a host there`},
		{"unix:run/x.sock", "want unix:///PATH"},
		{"unix:///", "the path is missing"},
		{"unix:///run/", "the path is that of a directory"},
		{"unix:///run/%00", "zero byte"},
		{"unix:///%zz", "invalid URL escape"},
		{"unix:///" + strings.Repeat("x", 200), "bytes at most, this one 201"},
		{"hybrid:///run/vm.vsock", "the port is missing"},
		{"hybrid:///run/vm.vsock:0", "port 0"},
		{"hybrid:///run/vm.vsock:http", `port "http"`},
		{"hybrid:///:52", "the path is missing"},
		{"hybrid:///run/:52", "a directory"},
		{"hybrid:///" + strings.Repeat("x", 100) + ":1234567", "bytes at most, this one 109"},
		{"hyperkit:///" + strings.Repeat("x", 100) + ":1", "bytes at most, this one 119"},
		{"tcp://127.0.0.1", "want tcp://HOST:PORT"},
		{"tcp://127.0.0.1:65536", "up to 65535"},
		{"tcp://127.0.0.1:80/x", "no place for a path"},
		{"hvsock://wildcard", "the service is missing"},
		{"hvsock://nobody/1024", `machine "nobody"`},
		{"hvsock://wildcard/http", `service "http": want a port or a GUID`},
		{"hvsock://wildcard/0CB41C0B-FD26-4A41-8370-DCCB048E216X", "want a port or a GUID"},
		{"fd:a/b", "want fd:NAME"},
		{"fd://a/b", "want fd:NAME"},
	} {
		t.Run(tt.url, func(t *testing.T) {
			a, err := Parse(tt.url)
			if err == nil {
				t.Fatalf("no error, but %s", a)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q, want one with %q", err, tt.want)
			}
			if a != (Addr{}) {
				t.Errorf("an address beside the error: %s", a)
			}
		})
	}
}

// TestSchemes shows that what manuals take from the table is true.
func TestSchemes(t *testing.T) {
	for _, s := range Schemes() {
		if a, err := Parse(s.Example); err != nil || a.Scheme() != s.Name || a.String() != s.Example {
			t.Errorf("%s: example %s is read as %s, %v", s.Name, s.Example, a, err)
		}
		if !strings.HasPrefix(s.Form, s.Name+":") || s.Use == "" {
			t.Errorf("%s: form %q, use %q", s.Name, s.Form, s.Use)
		}
	}
}

func TestRequestPath(t *testing.T) {
	for url, want := range map[string]string{"vsock://2:1024/connect": "/connect", "vsock://2:1024": "", "unix:///x": ""} {
		if got := mustParse(t, url).RequestPath(); got != want {
			t.Errorf("%s: request path %q, want %q", url, got, want)
		}
	}
}

func TestLocalPath(t *testing.T) {
	for _, tt := range []struct{ system, path, want string }{
		{"windows", "/c:/run/x", "c:/run/x"},
		{"windows", "/run/x", "/run/x"},
		{"windows", "/", "/"},
		{"linux", "/c:/run/x", "/c:/run/x"},
	} {
		if got := localPath(tt.system, tt.path); got != tt.want {
			t.Errorf("%s on %s: %s, want %s", tt.path, tt.system, got, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range Schemes() {
		f.Add(s.Example)
	}
	f.Add("vsock://null:1024/Users/me/vm")
	f.Add("vsock://00000400-FACB-11E6-BD58-64006A7986D3")
	f.Add("tcp://[fe80::1%25eth0]:80")
	f.Add("unix:////a%2fb%20c:5")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(a.String())
		if err != nil {
			t.Fatalf("%q is written as %q, which is no address: %v", text, a, err)
		}
		if again != a {
			t.Fatalf("%q is written as %q, which is read as %+v, not %+v", text, a, again, a)
		}
	})
}

func mustParse(t testing.TB, url string) Addr {
	t.Helper()
	a, err := Parse(url)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func guid(t testing.TB, s string) GUID {
	t.Helper()
	g, err := ParseGUID(s)
	if err != nil {
		t.Fatal(err)
	}
	return g
}
