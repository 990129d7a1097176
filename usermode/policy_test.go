package usermode

import (
	"net/netip"
	"testing"
)

func TestPolicy(t *testing.T) {
	p := policy{
		own:     []netip.Prefix{netip.MustParsePrefix("10.200.1.0/24"), netip.MustParsePrefix("fd00:200:1::/64")},
		blocked: netip.MustParsePrefix("10.200.2.0/24").Contains,
	}
	for _, tc := range []struct {
		dst  string
		want bool
	}{
		{"192.0.2.1", true},
		{"10.200.3.1", true},
		{"169.253.255.255", true},
		{"255.255.255.254", true},
		{"2001:db8::1", true},
		{"fd00:200:2::1", true},
		{"0.0.0.0", false},
		{"0.1.2.3", false},
		{"127.0.0.1", false},
		{"127.255.255.254", false},
		{"169.254.0.1", false},
		{"169.254.169.254", false},
		{"224.0.0.251", false},
		{"239.255.255.250", false},
		{"255.255.255.255", false},
		{"10.200.1.0", false},
		{"10.200.1.7", false},
		{"10.200.1.255", false},
		{"10.200.2.7", false},
		{"::", false},
		{"::1", false},
		{"fe80::1", false},
		{"fe80::1%eth0", false},
		{"febf::1", false},
		{"ff02::1", false},
		{"::ffff:127.0.0.1", false},
		{"::ffff:192.0.2.1", false},
		{"fd00:ec2::254", false},
		{"fd00:200:1::7", false},
		{"fd00:200:1::7%un0", false},
	} {
		dst := netip.MustParseAddr(tc.dst)
		got, ok := p.resolve(dst)
		if ok != tc.want {
			t.Errorf("resolve(%s): allowed %v, want %v", dst, ok, tc.want)
		}
		if ok && got != dst {
			t.Errorf("resolve(%s) = %s, want the address itself", dst, got)
		}
	}
	if _, ok := p.resolve(netip.Addr{}); ok {
		t.Error("resolve allowed the zero address")
	}
	if _, ok := (policy{}).resolve(netip.MustParseAddr("10.200.2.7")); !ok {
		t.Error("a policy without a block list refused an ordinary address")
	}
}

func TestPolicyHostAlias(t *testing.T) {
	host := netip.MustParseAddr("192.0.2.7")
	p := policy{host: func() netip.Addr { return host }}
	if got, ok := p.resolve(HostAlias); got != host || !ok {
		t.Errorf("resolve(%s) = %s, %t, want the host", HostAlias, got, ok)
	}
	if _, ok := p.resolve(HostAlias.Next()); ok {
		t.Error("resolve allowed the neighbour of the host's alias")
	}
	host = netip.Addr{}
	if _, ok := p.resolve(HostAlias); ok {
		t.Error("resolve allowed a host without an address")
	}
	if _, ok := (policy{}).resolve(HostAlias); ok {
		t.Error("resolve allowed the alias where it stands for nothing")
	}
}
