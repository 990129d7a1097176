package config

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
)

var cmpValues = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// base is what no options give, with change applied.
func base(change func(o *usernet.Options)) usernet.Options {
	o := usernet.Options{Mode: usernet.Usermode, ICC: true, Masquerade: true, FastPath: true}
	if change != nil {
		change(&o)
	}
	return o
}

func TestOptions(t *testing.T) {
	for _, tt := range []struct {
		name string
		raw  map[string]string
		want usernet.Options
	}{
		{"none", nil, base(nil)},
		{"mode", map[string]string{"mode": "bridge"}, base(func(o *usernet.Options) { o.Mode = usernet.Bridge })},
		{"prefixed", map[string]string{"usernet.mtu": "9000"}, base(func(o *usernet.Options) { o.MTU = 9000 })},
		{"docker", map[string]string{
			"mode":                                           "bridge",
			"com.docker.network.driver.mtu":                  "1400",
			"com.docker.network.bridge.name":                 "web0",
			"com.docker.network.bridge.enable_icc":           "false",
			"com.docker.network.bridge.enable_ip_masquerade": "0",
			"com.docker.network.bridge.host_binding_ipv4":    "127.0.0.1",
			"com.docker.network.bridge.inhibit_ipv4":         "T",
			"com.docker.network.container_iface_prefix":      "lan",
			"com.docker.network.host_ipv4":                   "192.0.2.1",
			"com.docker.network.host_ipv6":                   "2001:db8::1",
			"com.docker.network.enable_ipv6":                 "true",
			"com.docker.network.bridge.gateway_mode_ipv4":    "nat",
			"com.docker.network.bridge.default_bridge":       "false",
			"com.docker.network.advertise_addr_nmsgs":        "3",
		}, usernet.Options{
			Mode: usernet.Bridge, MTU: 1400, FastPath: true, BridgeName: "web0", InhibitHostIP: true, IfacePrefix: "lan",
			HostBinding: netip.MustParseAddr("127.0.0.1"),
			Source4:     netip.MustParseAddr("192.0.2.1"), Source6: netip.MustParseAddr("2001:db8::1"),
		}},
		{"same twice", map[string]string{"mtu": "1400", "usernet.mtu": "1400", "com.docker.network.driver.mtu": " 1400"},
			base(func(o *usernet.Options) { o.MTU = 1400 })},
		{"mapped address", map[string]string{"host_binding": "::ffff:127.0.0.1"},
			base(func(o *usernet.Options) { o.HostBinding = netip.MustParseAddr("127.0.0.1") })},
		{"subnets", map[string]string{"subnet": "10.200.0.0/24, fd00::/64", "gateway": "10.200.0.254"},
			base(func(o *usernet.Options) {
				o.Subnets = []usernet.Subnet{
					{Prefix: netip.MustParsePrefix("10.200.0.0/24"), Gateway: netip.MustParseAddr("10.200.0.254")},
					{Prefix: netip.MustParsePrefix("fd00::/64"), Gateway: netip.MustParseAddr("fd00::1")},
				}
			})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Options(tt.raw)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmpValues); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestOptionsRefused(t *testing.T) {
	known := "bridge, fastpath, gateway, host_binding, icc, iface_prefix, inhibit_ipv4, masquerade, mode, mtu, source_ipv4, source_ipv6, subnet"
	for _, tt := range []struct {
		raw  map[string]string
		want string // the whole error, or its end after "…"
	}{
		{map[string]string{"moed": "bridge"}, `invalid option "moed": unknown; did you mean mode? known are ` + known},
		{map[string]string{"colour": "red"}, `invalid option "colour": unknown; known are ` + known},
		{map[string]string{"usernet.mut": "1"}, `invalid option "usernet.mut": unknown; did you mean usernet.mtu? known are ` + known},
		{map[string]string{"com.docker.network.bridge.enable_ic": "1"},
			`invalid option "com.docker.network.bridge.enable_ic": unknown; did you mean com.docker.network.bridge.enable_icc? known are ` + known},
		{map[string]string{"": "x"}, `invalid option "": unknown; known are ` + known},
		{map[string]string{"com.docker.network.bridge.trusted_host_interfaces": "eth0"},
			"invalid option com.docker.network.bridge.trusted_host_interfaces=eth0: not supported"},
		{map[string]string{"com.docker.network.bridge.gateway_mode_ipv4": "routed"},
			"invalid option com.docker.network.bridge.gateway_mode_ipv4=routed: not supported"},
		{map[string]string{"mtu": "1400", "com.docker.network.driver.mtu": "1500"},
			"invalid options com.docker.network.driver.mtu=1500 and mtu=1400: they are the same option"},
		{map[string]string{"mode": "tap"}, "invalid option mode=tap: want usermode or bridge"},
		{map[string]string{"mtu": "67"}, "invalid option mtu=67: want a number of bytes from 68 to 65535"},
		{map[string]string{"mtu": "65536"}, "invalid option mtu=65536: want a number of bytes from 68 to 65535"},
		{map[string]string{"mtu": "big"}, "invalid option mtu=big: want a number of bytes from 68 to 65535"},
		{map[string]string{"icc": "maybe"}, "invalid option icc=maybe: want true or false"},
		{map[string]string{"bridge": "br0"}, "invalid option bridge: it needs mode=bridge"},
		{map[string]string{"com.docker.network.bridge.enable_ip_masquerade": "true"}, "invalid option masquerade: it needs mode=bridge"},
		{map[string]string{"mode": "bridge", "fastpath": "on"}, "invalid option fastpath: it needs mode=usermode"},
		{map[string]string{"fastpath": "maybe"}, "invalid option fastpath=maybe: want on or off"},
		{map[string]string{"mode": "bridge", "bridge": "a/b"}, "invalid option bridge=a/b: '/' cannot be in it"},
		{map[string]string{"mode": "bridge", "bridge": ".."}, "invalid option bridge=..: it is a directory"},
		{map[string]string{"mode": "bridge", "bridge": "sixteen-letters-"}, "invalid option bridge=sixteen-letters-: want 1 to 15 letters"},
		{map[string]string{"mode": "bridge", "bridge": "a b"}, "invalid option bridge=a b: ' ' cannot be in it"},
		{map[string]string{"mode": "bridge", "bridge": "br%d"}, "invalid option bridge=br%d: '%' cannot be in it"},
		{map[string]string{"iface_prefix": "thirteen-long"}, "invalid option iface_prefix=thirteen-long: want at most 12 letters, to leave room for a number"},
		{map[string]string{"host_binding": "localhost"}, "invalid option host_binding=localhost: want an IP address of the host"},
		{map[string]string{"host_binding": "fe80::1%eth0"}, "invalid option host_binding=fe80::1%eth0: want an IP address of the host"},
		{map[string]string{"mode": "bridge", "source_ipv4": "2001:db8::1"}, "invalid option source_ipv4=2001:db8::1: want an IPv4 address of the host"},
		{map[string]string{"mode": "bridge", "source_ipv6": "192.0.2.1"}, "invalid option source_ipv6=192.0.2.1: want an IPv6 address of the host"},
		{map[string]string{"gateway": "10.0.0.1"}, "invalid option gateway=10.0.0.1: 10.0.0.1 is in none of the subnets that option subnet gives"},
		{map[string]string{"subnet": "10.1.2.3/16"}, "invalid option subnet=10.1.2.3/16: 10.1.2.3/16 has bits behind its mask, did you mean 10.1.0.0/16?"},
		{map[string]string{"subnet": "10.0.0.0/8,10.1.0.0/16"}, "invalid option subnet=10.0.0.0/8,10.1.0.0/16: 10.0.0.0/8 and 10.1.0.0/16 overlap"},
		{map[string]string{"subnet": "10.0.0.0/32"}, "invalid option subnet=10.0.0.0/32: 10.0.0.0/32 has room for the gateway alone"},
		{map[string]string{"subnet": "0.0.0.0/0"}, "invalid option subnet=0.0.0.0/0: 0.0.0.0/0 is the whole internet"},
		{map[string]string{"subnet": strings.Repeat(",", 64)}, "invalid option subnet=" + strings.Repeat(",", 64) + ": want at most 64 subnets"},
		{map[string]string{"subnet": ""}, "invalid option subnet=: want subnets such as 10.1.0.0/24, separated by commas"},
		{map[string]string{"subnet": "10.1.0.0/24", "gateway": "10.1.0.255"},
			"invalid option gateway=10.1.0.255: gateway 10.1.0.255 is the network or the broadcast address of 10.1.0.0/24"},
		{map[string]string{"subnet": "10.1.0.0/24", "gateway": "10.1.0.1,10.1.0.2"},
			"invalid option gateway=10.1.0.1,10.1.0.2: 10.1.0.0/24 has two gateways"},
	} {
		_, err := Options(tt.raw)
		if !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("Options(%v) = %v, want ErrInvalid", tt.raw, err)
			continue
		}
		if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
			t.Errorf("Options(%v) error -want +got\n%s", tt.raw, diff)
		}
	}
}

func TestOptionsOver(t *testing.T) {
	defaults := map[string]string{"mtu": "1400", "masquerade": "false", "icc": "false"}
	for _, tt := range []struct {
		name     string
		defaults map[string]string
		raw      map[string]string
		want     usernet.Options
	}{
		{"defaults alone", defaults, nil, base(func(o *usernet.Options) { o.MTU, o.ICC = 1400, false })},
		{"another spelling wins", defaults, map[string]string{"com.docker.network.driver.mtu": "9000"},
			base(func(o *usernet.Options) { o.MTU, o.ICC = 9000, false })},
		{"bridge", defaults, map[string]string{"mode": "bridge", "icc": "true"},
			base(func(o *usernet.Options) { o.Mode, o.MTU, o.Masquerade = usernet.Bridge, 1400, false })},
		{"default mode", map[string]string{"mode": "bridge", "masquerade": "false"}, nil,
			base(func(o *usernet.Options) { o.Mode, o.Masquerade = usernet.Bridge, false })},
		{"mode over default mode", map[string]string{"mode": "bridge", "masquerade": "false"}, map[string]string{"usernet.mode": "usermode"},
			base(nil)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := OptionsOver(tt.defaults, tt.raw)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmpValues); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"mode", "mode", 0}, {"moed", "mode", 1}, {"mut", "mtu", 1}, {"a very long key", "mtu", 12}, {"kitten", "sitting", 3},
	} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("distance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func FuzzOptions(f *testing.F) {
	for _, name := range Names() {
		f.Add("mode", "bridge", name, "true")
		f.Add("usernet."+name, "10.0.0.0/24,fd00::/64", "gateway", "10.0.0.1")
	}
	f.Add("mtu", "1400", "com.docker.network.driver.mtu", "1500")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		raw := map[string]string{k1: v1, k2: v2}
		before := maps.Clone(raw)
		o, err := Options(raw)
		if !maps.Equal(raw, before) {
			t.Fatal("the caller's map was changed")
		}
		if err != nil {
			if !errors.Is(err, usernet.ErrInvalid) {
				t.Fatalf("%v does not wrap ErrInvalid", err)
			}
			return
		}
		if o.MTU != 0 && (o.MTU < minMTU || o.MTU > maxMTU) {
			t.Errorf("MTU %d", o.MTU)
		}
		if len(o.BridgeName) > maxLinkName || strings.ContainsAny(o.BridgeName, "/ :\n") {
			t.Errorf("bridge name %q", o.BridgeName)
		}
		if o.Mode != usernet.Bridge && (o.BridgeName != "" || !o.Masquerade || o.InhibitHostIP) {
			t.Errorf("bridge options on a network of mode %s: %+v", o.Mode, o)
		}
		n := usernet.Network{Subnets: o.Subnets, IPv6: slices.ContainsFunc(o.Subnets, func(s usernet.Subnet) bool { return s.Prefix.Addr().Is6() })}
		if err := Network(n); err != nil {
			t.Errorf("subnets that Options allows: %v", err)
		}
	})
}

func TestMerge(t *testing.T) {
	got, err := Merge(map[string]string{"mtu": "1400", "masquerade": "false", "icc": "false"}, map[string]string{"usernet.icc": "true", "com.docker.network.enable_ipv6": "true"})
	if err != nil {
		t.Fatal(err)
	}
	// masquerade means nothing for usermode networks, and the engine's own options mean nothing to us.
	if want := map[string]string{"mtu": "1400", "icc": "true"}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
