//go:build linux

package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	miekg "github.com/miekg/dns"
)

var compare = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

func testRecords() *Records {
	r := NewRecords(Network{
		Domains: []string{"dns.podman", "Web.Example."},
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.200.1.7/24"), netip.MustParsePrefix("fd00:1::/64"), netip.MustParsePrefix("10.201.16.0/20")},
		Host:    addrs("10.200.1.254"),
		Gateway: addrs("10.200.1.1", "fd00:1::1"),
	})
	r.Set("a", Entry{Names: []string{"Web", "front", "a0123456789b", "www.shop.example"}, Addrs: addrs("10.200.1.2", "fd00:1::2")})
	r.Set("b", Entry{Names: []string{"db", "front"}, Addrs: addrs("10.200.1.3")})
	return r
}

func TestRecords(t *testing.T) {
	r := testRecords()
	name6, err := miekg.ReverseAddr("fd00:1::2")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		want Answer
	}{
		{"web.", Answer{Addrs: addrs("10.200.1.2", "fd00:1::2")}},
		{"web.dns.podman.", Answer{Addrs: addrs("10.200.1.2", "fd00:1::2"), Zone: "dns.podman."}},
		{"web.web.example.", Answer{Addrs: addrs("10.200.1.2", "fd00:1::2"), Zone: "web.example."}},
		{"www.shop.example.", Answer{Addrs: addrs("10.200.1.2", "fd00:1::2")}},
		{"front.", Answer{Addrs: addrs("10.200.1.2", "fd00:1::2", "10.200.1.3")}},
		{"db.", Answer{Addrs: addrs("10.200.1.3")}},
		{"nobody.dns.podman.", Answer{Missing: true, Zone: "dns.podman."}},
		{"dns.podman.", Answer{Zone: "dns.podman."}},
		{"host.containers.internal.", Answer{Addrs: addrs("10.200.1.254")}},
		{"host.docker.internal.", Answer{Addrs: addrs("10.200.1.254")}},
		{"gateway.containers.internal.", Answer{Addrs: addrs("10.200.1.1", "fd00:1::1")}},
		{"2.1.200.10.in-addr.arpa.", Answer{Names: []string{"web.dns.podman."}}},
		{"1.1.200.10.in-addr.arpa.", Answer{Names: []string{"gateway.containers.internal."}}},
		{"9.1.200.10.in-addr.arpa.", Answer{Missing: true, Zone: "1.200.10.in-addr.arpa."}},
		{"x.9.1.200.10.in-addr.arpa.", Answer{Missing: true, Zone: "9.1.200.10.in-addr.arpa."}},
		{"1.200.10.in-addr.arpa.", Answer{Zone: "200.10.in-addr.arpa."}},
		{"17.201.10.in-addr.arpa.", Answer{Zone: "201.10.in-addr.arpa."}},
		{name6, Answer{Names: []string{"web.dns.podman."}}},
	} {
		got, ok := r.Lookup(tt.name)
		if diff := cmp.Diff(tt.want, got, compare); !ok || diff != "" {
			t.Errorf("%s: %v, -want +got\n%s", tt.name, ok, diff)
		}
	}
	for _, name := range []string{
		".", "com.", "nobody.", "web.other.", "xdns.podman.", "podman.", "shop.example.", "other.containers.internal.",
		"2.2.200.10.in-addr.arpa.", "200.10.in-addr.arpa.", "201.10.in-addr.arpa.", "32.201.10.in-addr.arpa.", "in-addr.arpa.", "d.f.ip6.arpa.",
	} {
		if got, ok := r.Lookup(name); ok {
			t.Errorf("%s: answered with %+v, want it left to others", name, got)
		}
	}
}

func TestRecordsChange(t *testing.T) {
	r := testRecords()
	find := func(name string, want ...string) {
		t.Helper()
		got, _ := r.Lookup(name)
		if diff := cmp.Diff(addrs(want...), got.Addrs, compare); diff != "" {
			t.Errorf("%s: -want +got\n%s", name, diff)
		}
	}
	for range 2 { // as often as the engine likes
		r.Set("b", Entry{Names: []string{"db2", "front"}, Addrs: addrs("10.200.1.4", "10.200.1.5")})
	}
	find("db.")
	find("db2.", "10.200.1.4", "10.200.1.5")
	find("front.", "10.200.1.2", "fd00:1::2", "10.200.1.4", "10.200.1.5")
	for range 2 {
		r.Delete("a")
	}
	find("web.")
	find("front.", "10.200.1.4", "10.200.1.5")
	if a, _ := r.Lookup("2.1.200.10.in-addr.arpa."); !a.Missing {
		t.Errorf("reverse name of a container that is gone: %+v", a)
	}
	r.Set("b", Entry{})
	find("front.")

	// The special names are nobody's; names that DNS cannot have are left out, not the rest of the entry.
	r.Set("c", Entry{Names: []string{strings.Repeat("x", 64), "", ".", "a..b", "ok", "host.docker.internal"}, Addrs: addrs("10.200.1.6")})
	find("ok.", "10.200.1.6")
	find("host.docker.internal.", "10.200.1.254")
	if len(r.names) != 5 { // ok and the four special ones
		t.Errorf("%d names are left: %v", len(r.names), r.names)
	}
}

// A name with other letters than ASCII is asked for in escapes; both spellings are one.
func TestRecordsCanonical(t *testing.T) {
	r := NewRecords(Network{})
	r.Set("a", Entry{Names: []string{"größe_1"}, Addrs: addrs("10.200.1.2")})
	q := question(`gr\195\182\195\159e_1`, miekg.TypeA)
	msg, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var parsed query
	if rcode, ok := parsed.parse(msg); rcode != 0 || !ok {
		t.Fatal(rcode, ok)
	}
	if _, ok := r.Lookup(parsed.name); !ok {
		t.Errorf("%s is not found", parsed.name)
	}
}

// Readers see an endpoint whole or not at all, however many write.
func TestRecordsConcurrently(t *testing.T) {
	r := NewRecords(Network{Domains: []string{"dns.podman"}})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprint(i)
			for n := range 200 {
				r.Set(id, Entry{Names: []string{"n" + id, "all"}, Addrs: addrs(fmt.Sprintf("10.200.%d.1", n), fmt.Sprintf("10.201.%d.1", n))})
				a, ok := r.Lookup("n" + id + ".dns.podman.")
				if !ok || len(a.Addrs) != 2 || a.Addrs[0].As4()[2] != byte(n) || a.Addrs[1].As4()[2] != byte(n) {
					t.Errorf("round %d: %+v %v", n, a, ok)
				}
				if a, ok := r.Lookup("all."); !ok || len(a.Addrs)%2 != 0 && n == 0 {
					t.Errorf("all: %+v %v", a, ok)
				}
			}
			r.Delete(id)
		})
	}
	wg.Wait()
	if len(r.names)+len(r.addrs)+len(r.entries) != 0 {
		t.Errorf("left: %v %v %v", r.names, r.addrs, r.entries)
	}
}

func TestParseReverse(t *testing.T) {
	for _, a := range addrs("10.200.1.2", "0.0.0.0", "255.255.255.255", "2001:db8::1", "::", "fd00:1234:5678:9abc:def0:1234:5678:9abc") {
		name, err := miekg.ReverseAddr(a.String())
		if err != nil {
			t.Fatal(err)
		}
		if p, exact, ok := parseReverse(name); !ok || !exact || p != netip.PrefixFrom(a, a.BitLen()) {
			t.Errorf("%s: %v %v %v", name, p, exact, ok)
		}
	}
	for name, want := range map[string]string{
		"10.in-addr.arpa.":             "10.0.0.0/8",
		"foo.2.1.200.10.in-addr.arpa.": "10.200.1.2/32",
		"0/25.1.200.10.in-addr.arpa.":  "10.200.1.0/24", // RFC 2317
		"01.200.10.in-addr.arpa.":      "10.200.0.0/16",
		"256.200.10.in-addr.arpa.":     "10.200.0.0/16",
		"x8.b.d.0.1.0.0.2.ip6.arpa.":   "2001:db0::/28",
	} {
		if p, exact, ok := parseReverse(name); !ok || exact || p.String() != want {
			t.Errorf("%s: %v %v %v, want %s and not exact", name, p, exact, ok, want)
		}
	}
	for _, name := range []string{".", "in-addr.arpa.", "x.in-addr.arpa.", "ip6.arpa.", "10.in-addr.arpa.example.", "10in-addr.arpa."} {
		if p, _, ok := parseReverse(name); ok {
			t.Errorf("%s: %v, want none", name, p)
		}
	}
}

func FuzzParseReverse(f *testing.F) {
	f.Add("2.1.200.10.in-addr.arpa.")
	f.Add("8.b.d.0.1.0.0.2.ip6.arpa.")
	f.Add("..in-addr.arpa.")
	f.Fuzz(func(t *testing.T, name string) {
		p, exact, ok := parseReverse(name)
		if !ok {
			return
		}
		if !p.IsValid() || p.Bits() == 0 || exact && !p.IsSingleIP() {
			t.Fatalf("%q: %v %v", name, p, exact)
		}
		if want, err := miekg.ReverseAddr(p.Addr().String()); exact && (err != nil || want != strings.ToLower(name)) {
			t.Fatalf("%q is exactly %v, whose name is %s", name, p, want)
		}
	})
}
