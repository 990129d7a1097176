//go:build linux

package dns

import (
	"log/slog"
	"net/netip"
	"testing"

	miekg "github.com/miekg/dns"
)

// Two networks with names in the same domain, one of them without a way out. A client on both knows the names of both
// and gets out, whichever it asks; a client on one knows that one; a stranger gets nothing.
func TestClients(t *testing.T) {
	both, one, stranger := netip.MustParseAddr("10.200.1.2"), netip.MustParseAddr("10.200.1.3"), netip.MustParseAddr("10.9.9.9")
	const upstream = "upstream of "
	resolvers := map[string]*Resolver{}
	records := func(name, addr, addr6 string) *Records {
		r := NewRecords(Network{Domains: []string{"dns.podman"}})
		r.Set("x", Entry{Names: []string{name, "shared"}, Addrs: addrs(addr)})
		r.Set("y", Entry{Names: []string{"only" + name}, Addrs: addrs(addr6)})
		return r
	}
	resolver := func(name, other string, r *Records, servers func() []netip.AddrPort) {
		resolvers[name] = New(Config{Sources: []Source{r}, Servers: servers, Log: slog.New(slog.DiscardHandler),
			Client: func(a netip.Addr) ([]*Resolver, bool) {
				if a == both {
					return []*Resolver{resolvers[other]}, true
				}
				return nil, a == one
			}})
	}
	resolver("inner", "outer", records("in", "10.200.1.10", "fd00:1::10"), nil)
	resolver("outer", "inner", records("out", "10.200.2.10", "fd00:2::10"), func() []netip.AddrPort { return nil })
	for _, tt := range []struct {
		resolver string
		client   netip.Addr
		name     string
		want     string
	}{
		{"inner", one, "in", "10.200.1.10"},
		{"inner", one, "in.dns.podman", "10.200.1.10"},
		{"inner", one, "out", "NXDOMAIN"},
		{"inner", one, "out.dns.podman", "NXDOMAIN"},
		{"inner", one, "www.example.com", "NXDOMAIN"},
		{"inner", both, "in.dns.podman", "10.200.1.10"},
		{"inner", both, "out", "10.200.2.10"},
		{"inner", both, "out.dns.podman", "10.200.2.10"},
		{"inner", both, "onlyout.dns.podman", "NOERROR"}, // it has no IPv4 address
		{"inner", both, "shared", "10.200.1.10"},
		{"inner", both, "nobody.dns.podman", "NXDOMAIN"},
		{"inner", both, "www.example.com", upstream + "outer"},
		{"outer", both, "in.dns.podman", "10.200.1.10"},
		{"outer", both, "shared", "10.200.2.10"},
		{"outer", both, "www.example.com", upstream + "outer"},
		{"outer", one, "in", upstream + "outer"},
		{"outer", one, "in.dns.podman", "NXDOMAIN"},
		{"inner", stranger, "in", "REFUSED"},
		{"outer", stranger, "www.example.com", "REFUSED"},
	} {
		t.Run(tt.resolver+" "+tt.client.String()+" "+tt.name, func(t *testing.T) {
			msg, err := question(tt.name, miekg.TypeA).Pack()
			if err != nil {
				t.Fatal(err)
			}
			reply, via := resolvers[tt.resolver].answer(new(query), nil, msg, peer{tt.client, overUDP})
			got := ""
			for name, r := range resolvers {
				if via == r {
					got = upstream + name
				}
			}
			if via == nil {
				var m miekg.Msg
				if err := m.Unpack(reply); err != nil {
					t.Fatal(err)
				}
				got = miekg.RcodeToString[m.Rcode]
				if d := data(m.Answer); len(d) == 1 {
					got = d[0]
				}
			}
			if got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}
