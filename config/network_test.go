package config

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/usernet/usernet"
)

func TestNetwork(t *testing.T) {
	sub := func(prefix, gateway string, reserved ...string) usernet.Subnet {
		s := usernet.Subnet{Prefix: netip.MustParsePrefix(prefix)}
		if gateway != "" {
			s.Gateway = netip.MustParseAddr(gateway)
		}
		for _, r := range reserved {
			s.Reserved = append(s.Reserved, netip.MustParseAddr(r))
		}
		return s
	}
	mtu := func(n int) usernet.Options { return usernet.Options{MTU: n} }
	for _, tt := range []struct {
		name string
		net  usernet.Network
		want string // "" means it is good
	}{
		{"no subnets", usernet.Network{}, ""},
		{"dual", usernet.Network{IPv6: true, Subnets: []usernet.Subnet{sub("10.1.0.0/24", "10.1.0.1", "10.1.0.9"), sub("fd00::/64", "fd00::1")}}, ""},
		{"two of a family", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.0/24", ""), sub("10.1.1.0/24", "10.1.1.254")}}, ""},
		{"point to point", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.0/31", "10.1.0.0")}}, ""},
		{"small MTU", usernet.Network{Options: mtu(68)}, ""},
		{"MTU of IPv6", usernet.Network{IPv6: true, Options: mtu(1280)}, ""},

		{"MTU too small", usernet.Network{Options: mtu(67)}, "invalid MTU 67: want 68 to 65535 bytes"},
		{"MTU too small for IPv6", usernet.Network{IPv6: true, Options: mtu(1279)}, "invalid MTU 1279: IPv6 needs 1280 bytes (RFC 8200)"},
		{"MTU too small for usermode", usernet.Network{Options: usernet.Options{Mode: usernet.Usermode, MTU: 1279}},
			"invalid MTU 1279: networks of mode usermode need 1280 bytes"},
		{"IPv6 off", usernet.Network{Subnets: []usernet.Subnet{sub("fd00::/64", "")}}, "invalid subnet fd00::/64: IPv6 is not enabled on the network"},
		{"many subnets", usernet.Network{Subnets: make([]usernet.Subnet, 65)}, "invalid network: 65 subnets, want at most 64"},
		{"overlap", usernet.Network{Subnets: []usernet.Subnet{sub("10.0.0.0/8", ""), sub("10.1.0.0/24", "")}}, "invalid subnet 10.1.0.0/24: it overlaps 10.0.0.0/8"},
		{"unmasked", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.5/24", "")}}, "invalid subnet 10.1.0.5/24: it has bits behind its mask"},
		{"empty", usernet.Network{Subnets: []usernet.Subnet{{}}}, "invalid subnet invalid Prefix: it is empty"},
		{"one address", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.5/32", "")}}, "invalid subnet 10.1.0.5/32: 10.1.0.5/32 has room for the gateway alone"},
		{"everything", usernet.Network{IPv6: true, Subnets: []usernet.Subnet{sub("::/0", "")}}, "invalid subnet ::/0: ::/0 is the whole internet"},
		{"loopback", usernet.Network{Subnets: []usernet.Subnet{sub("127.1.0.0/16", "")}}, "invalid subnet 127.1.0.0/16: 127.1.0.0/16 is loopback or multicast"},
		{"mapped", usernet.Network{IPv6: true, Subnets: []usernet.Subnet{sub("::ffff:10.1.0.0/120", "")}}, "invalid subnet ::ffff:10.1.0.0/120: ::ffff:10.1.0.0/120 is IPv4 written as IPv6"},
		{"gateway outside", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.0/24", "10.2.0.1")}}, "invalid subnet 10.1.0.0/24: gateway 10.2.0.1 is outside 10.1.0.0/24"},
		{"gateway of the other family", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.0/24", "fd00::1")}}, "invalid subnet 10.1.0.0/24: gateway fd00::1 is outside 10.1.0.0/24"},
		{"gateway is the network", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.0/24", "10.1.0.0")}}, "invalid subnet 10.1.0.0/24: gateway 10.1.0.0 is the network or the broadcast address of 10.1.0.0/24"},
		{"gateway reserved", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.0/24", "10.1.0.1", "10.1.0.1")}}, "invalid subnet 10.1.0.0/24: gateway 10.1.0.1 is reserved"},
		{"reserved outside", usernet.Network{Subnets: []usernet.Subnet{sub("10.1.0.0/24", "", "10.2.0.1")}}, "invalid subnet 10.1.0.0/24: reserved address 10.2.0.1 is outside"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Network(tt.net)
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, usernet.ErrInvalid) || err.Error() != tt.want {
				t.Errorf("error\nwant %s\n got %v", tt.want, err)
			}
		})
	}
}
