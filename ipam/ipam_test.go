package ipam

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/usernet/usernet"
)

func TestNext(t *testing.T) {
	p := netip.MustParsePrefix
	a := netip.MustParseAddr
	for _, tt := range []struct {
		name   string
		subnet usernet.Subnet
		taken  []netip.Addr
		want   string // "" for exhausted
	}{
		{"first after the gateway", usernet.Subnet{Prefix: p("10.0.0.0/24"), Gateway: a("10.0.0.1")}, nil, "10.0.0.2"},
		{"gateway elsewhere", usernet.Subnet{Prefix: p("10.0.0.0/24"), Gateway: a("10.0.0.254")}, nil, "10.0.0.1"},
		{"reserved and taken", usernet.Subnet{Prefix: p("10.0.0.0/24"), Gateway: a("10.0.0.1"), Reserved: []netip.Addr{a("10.0.0.2")}},
			[]netip.Addr{a("10.0.0.3")}, "10.0.0.4"},
		{"not the broadcast address", usernet.Subnet{Prefix: p("10.0.0.0/30"), Gateway: a("10.0.0.1")}, []netip.Addr{a("10.0.0.2")}, ""},
		{"from the range", usernet.Subnet{Prefix: p("10.0.0.0/24"), Gateway: a("10.0.0.1"), First: a("10.0.0.9")}, []netip.Addr{a("10.0.0.9")}, "10.0.0.10"},
		{"behind the range", usernet.Subnet{Prefix: p("10.0.0.0/24"), Gateway: a("10.0.0.1"), Last: a("10.0.0.3")},
			[]netip.Addr{a("10.0.0.2"), a("10.0.0.3")}, ""},
		{"point to point", usernet.Subnet{Prefix: p("10.0.0.0/31"), Gateway: a("10.0.0.0")}, nil, "10.0.0.1"},
		{"one address", usernet.Subnet{Prefix: p("10.0.0.7/32")}, nil, "10.0.0.7"},
		{"IPv6", usernet.Subnet{Prefix: p("fd00::/64"), Gateway: a("fd00::1")}, nil, "fd00::2"},
		{"end of the address space", usernet.Subnet{Prefix: p("255.255.255.254/31"), Gateway: a("255.255.255.254")},
			[]netip.Addr{a("255.255.255.255")}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Next(tt.subnet, func(x netip.Addr) bool {
				for _, y := range tt.taken {
					if x == y {
						return true
					}
				}
				return false
			})
			if tt.want == "" {
				if !errors.Is(err, ErrExhausted) {
					t.Fatalf("got %v, %v, want exhausted", got, err)
				}
				return
			}
			if err != nil || got.String() != tt.want {
				t.Errorf("got %v, %v, want %s", got, err, tt.want)
			}
		})
	}
}

func TestSubnet4AvoidsWhatIsUsed(t *testing.T) {
	got, err := Subnet4([]netip.Prefix{netip.MustParsePrefix("10.87.0.0/23"), netip.MustParsePrefix("fd00::/8")})
	if err != nil || got.Prefix.String() != "10.87.2.0/24" || got.Gateway.String() != "10.87.2.1" {
		t.Errorf("got %+v, %v, want 10.87.2.0/24 with gateway 10.87.2.1", got, err)
	}
	if got, err := Subnet4([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}); !errors.Is(err, ErrExhausted) {
		t.Errorf("with everything used: got %v, %v, want exhausted", got, err)
	}
}
