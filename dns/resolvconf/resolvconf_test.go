package resolvconf

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var compare = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

func servers(list string) []netip.AddrPort {
	var ss []netip.AddrPort
	for _, s := range strings.Fields(list) {
		ss = append(ss, netip.AddrPortFrom(netip.MustParseAddr(s), 53))
	}
	return ss
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       Config
	}{
		{"nothing", "", Config{}},
		{"usual", "# made by x\nnameserver 192.0.2.1\nnameserver\t2001:db8::1\nsearch a.example b.example\noptions ndots:2 timeout:1\n",
			Config{servers("192.0.2.1 2001:db8::1"), []string{"a.example", "b.example"}}},
		{"systemd-resolved", "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch .\n", Config{Servers: servers("127.0.0.53")}},
		{"scope", "nameserver fe80::1%eth0", Config{Servers: servers("fe80::1%eth0")}},
		{"mapped", "nameserver ::ffff:192.0.2.1", Config{Servers: servers("192.0.2.1")}},
		{"unspecified", "nameserver 0.0.0.0\nnameserver ::", Config{Servers: servers("127.0.0.1 ::1")}},
		{"twice", "nameserver 192.0.2.1\nnameserver 192.0.2.1", Config{Servers: servers("192.0.2.1")}},
		{"comments", "nameserver 192.0.2.1 # one\nnameserver 192.0.2.2;two\n;nameserver 192.0.2.3", Config{Servers: servers("192.0.2.1 192.0.2.2")}},
		{"carriage returns", "nameserver 192.0.2.1\r\nsearch a.example\r\n", Config{servers("192.0.2.1"), []string{"a.example"}}},
		{"not an address", "nameserver dns.example\nnameserver\nnameserver 192.0.2.300\nnameserver 224.0.0.1\n", Config{}},
		{"the last search list wins", "search a\ndomain b c\n", Config{Search: []string{"b"}}},
		{"too many", strings.Repeat("nameserver 192.0.2.1\n", 3) + "nameserver ::1\nnameserver ::2\nnameserver ::3\nnameserver ::4\n" +
			"nameserver ::5\nnameserver ::6\nnameserver ::7\nnameserver ::8\n", Config{Servers: servers("192.0.2.1 ::1 ::2 ::3 ::4 ::5 ::6 ::7")}},
		{"binary", "\x00\xff\nnameserver \x00\n", Config{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Parse([]byte(tt.text)), compare); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nsearch a b\noptions x\n"))
	f.Add([]byte("nameserver fe80::1%x\r\ndomain a#"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c := Parse(text)
		if len(c.Servers) > maxServers || len(c.Search) > maxSearch {
			t.Fatalf("%d servers, %d domains", len(c.Servers), len(c.Search))
		}
		var again strings.Builder
		for _, s := range c.Servers {
			if !s.Addr().IsValid() || s.Addr().IsUnspecified() || s.Port() != 53 {
				t.Fatalf("server %v", s)
			}
			again.WriteString("nameserver " + s.Addr().String() + "\n")
		}
		if len(c.Search) > 0 {
			again.WriteString("search " + strings.Join(c.Search, " ") + "\n")
		}
		if strings.ContainsAny(again.String(), "#;") { // in a scope
			return
		}
		if diff := cmp.Diff(c, Parse([]byte(again.String())), compare); diff != "" {
			t.Errorf("written out again and read: -want +got\n%s", diff)
		}
	})
}
