package agent

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

func TestNewLease(t *testing.T) {
	ip := func(s string) net.IP { return net.ParseIP(s) }
	opt := func(code uint8, b ...byte) dhcpv4.Modifier {
		return dhcpv4.WithGeneric(dhcpv4.GenericOptionCode(code), b)
	}
	addr := netip.MustParseAddr
	prefix := netip.MustParsePrefix
	hour := lease{renew: 30 * time.Minute, rebind: 52*time.Minute + 30*time.Second, expires: time.Hour}
	for _, tt := range []struct {
		name  string
		mods  []dhcpv4.Modifier
		want  settings
		times lease // zero: hour
		bad   bool
	}{
		{
			name: "gvproxy's",
			mods: []dhcpv4.Modifier{
				dhcpv4.WithYourIP(ip("192.168.127.2")), dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithRouter(ip("192.168.127.1")),
				dhcpv4.WithDNS(ip("192.168.127.1")), opt(26, 5, 220), dhcpv4.WithLeaseTime(3600), dhcpv4.WithDomainSearchList("example.com", "bad name"),
			},
			want: settings{
				addr: prefix("192.168.127.2/24"), routes: []route{{prefix("0.0.0.0/0"), addr("192.168.127.1")}},
				mtu: 1500, dns: []netip.Addr{addr("192.168.127.1")}, search: []string{"example.com"},
			},
		},
		{
			name: "classless routes instead of a router, those on the link first",
			mods: []dhcpv4.Modifier{
				dhcpv4.WithYourIP(ip("10.200.0.2")), dhcpv4.WithNetmask(net.CIDRMask(32, 32)), dhcpv4.WithRouter(ip("10.200.0.9")),
				opt(121, 0, 10, 201, 0, 1, 32, 10, 201, 0, 1, 0, 0, 0, 0),
			},
			want: settings{addr: prefix("10.200.0.2/32"), routes: []route{{dst: prefix("10.201.0.1/32")}, {prefix("0.0.0.0/0"), addr("10.201.0.1")}}},
		},
		{
			name: "hardly anything, and a domain for want of a list",
			mods: []dhcpv4.Modifier{dhcpv4.WithYourIP(ip("10.200.0.2")), opt(15, []byte("example.com")...), opt(26, 0, 68)},
			want: settings{addr: prefix("10.200.0.2/32"), search: []string{"example.com"}},
		},
		{
			name:  "for ever, and the longest MTU",
			mods:  []dhcpv4.Modifier{dhcpv4.WithYourIP(ip("10.200.0.2")), dhcpv4.WithLeaseTime(1<<32 - 1), opt(26, 255, 255)},
			want:  settings{addr: prefix("10.200.0.2/32"), mtu: 65521},
			times: lease{renew: 1},
		},
		{
			name:  "times of its own",
			mods:  []dhcpv4.Modifier{dhcpv4.WithYourIP(ip("10.200.0.2")), dhcpv4.WithLeaseTime(100), opt(58, 0, 0, 0, 10), opt(59, 0, 0, 0, 20)},
			want:  settings{addr: prefix("10.200.0.2/32")},
			times: lease{renew: 10 * time.Second, rebind: 20 * time.Second, expires: 100 * time.Second},
		},
		{
			name:  "times in the wrong order",
			mods:  []dhcpv4.Modifier{dhcpv4.WithYourIP(ip("10.200.0.2")), dhcpv4.WithLeaseTime(80), opt(58, 0, 0, 0, 75), opt(59, 0, 0, 0, 90)},
			want:  settings{addr: prefix("10.200.0.2/32")},
			times: lease{renew: 40 * time.Second, rebind: 70 * time.Second, expires: 80 * time.Second},
		},
		{
			name:  "no time at all",
			mods:  []dhcpv4.Modifier{dhcpv4.WithYourIP(ip("10.200.0.2")), dhcpv4.WithLeaseTime(0)},
			want:  settings{addr: prefix("10.200.0.2/32")},
			times: lease{renew: time.Second, rebind: 1750 * time.Millisecond, expires: 2 * time.Second},
		},
		{name: "no address", bad: true},
		{name: "everybody's", mods: []dhcpv4.Modifier{dhcpv4.WithYourIP(ip("255.255.255.255"))}, bad: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ack, err := dhcpv4.New(tt.mods...)
			if err != nil {
				t.Fatal(err)
			}
			if ack, err = dhcpv4.FromBytes(ack.ToBytes()); err != nil {
				t.Fatal(err)
			}
			l, err := newLease(ack, time.Time{})
			if tt.bad {
				if err == nil {
					t.Errorf("got %v, want an error", l)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			equal := cmp.Options{cmp.AllowUnexported(settings{}, route{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.EquateEmpty()}
			if d := cmp.Diff(tt.want, l.settings, equal); d != "" {
				t.Errorf("settings (-want +got):\n%s", d)
			}
			want := tt.times
			switch want.renew {
			case 0:
				want = hour
			case 1:
				want = lease{}
			}
			if l.renew != want.renew || l.rebind != want.rebind || l.expires != want.expires {
				t.Errorf("times %v, %v, %v; want %v, %v, %v", l.renew, l.rebind, l.expires, want.renew, want.rebind, want.expires)
			}
		})
	}
}

// FuzzLease has whatever a server can say make settings that can be made.
func FuzzLease(f *testing.F) {
	ack, err := dhcpv4.New(dhcpv4.WithYourIP(net.IPv4(10, 200, 0, 2)), dhcpv4.WithDNS(net.IPv4(10, 200, 0, 1)), dhcpv4.WithRouter(net.IPv4(10, 200, 0, 1)),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithDomainSearchList("example.com"), dhcpv4.WithLeaseTime(60))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ack.ToBytes())
	ack.UpdateOption(dhcpv4.OptIPAddressLeaseTime(50 * 365 * 24 * time.Hour)) // seven times of which were less than nothing
	f.Add(ack.ToBytes())
	ack.UpdateOption(dhcpv4.OptIPAddressLeaseTime(time.Minute))
	for _, option := range [][]byte{{26, 1, 5}, {121, 5, 33, 1, 2, 3, 4}, {58, 2, 1, 1}, {119, 2, 192, 0}, {1, 4, 255, 0, 255, 0}, {6, 3, 1, 1, 1}} {
		b := ack.ToBytes()
		f.Add(append(b[:len(b)-1:len(b)-1], append(option, 255)...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ack, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l, err := newLease(ack, time.Time{})
		if err != nil {
			return
		}
		if !l.addr.IsValid() || !l.addr.Addr().Is4() || l.addr.Addr().IsUnspecified() {
			t.Errorf("address %s", l.addr)
		}
		for _, r := range l.routes {
			if !r.dst.IsValid() || r.dst != r.dst.Masked() {
				t.Errorf("route %v", r)
			}
		}
		if l.mtu != 0 && (l.mtu < minMTU || l.mtu > maxMTU) {
			t.Errorf("mtu %d", l.mtu)
		}
		if l.expires != 0 && !(0 < l.renew && l.renew <= l.rebind && l.rebind <= l.expires) {
			t.Errorf("times %v, %v, %v", l.renew, l.rebind, l.expires)
		}
		for _, name := range l.search {
			for _, c := range []byte(name) {
				if c <= ' ' || c == '#' || c == ';' {
					t.Errorf("search %q", name)
				}
			}
		}
	})
}
