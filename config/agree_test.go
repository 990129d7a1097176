package config

import (
	"net/netip"
	"testing"

	"github.com/usernet/usernet"
)

func TestAgrees(t *testing.T) {
	made, err := Options(map[string]string{"mode": "bridge", "bridge": "br7", "icc": "false"})
	if err != nil {
		t.Fatal(err)
	}
	n := usernet.Network{ID: "n", Options: made, Subnets: []usernet.Subnet{
		{Prefix: netip.MustParsePrefix("10.200.1.0/24"), Gateway: netip.MustParseAddr("10.200.1.1")},
	}}
	for _, tt := range []struct {
		name string
		raw  map[string]string
		want bool
	}{
		{"nothing", nil, true},
		{"all again", map[string]string{"mode": "bridge", "bridge": "br7", "icc": "false", "subnet": "10.200.1.0/24"}, true},
		{"some again", map[string]string{"usernet.icc": "0"}, true},
		{"a default", map[string]string{"mtu": "1500", "masquerade": "true"}, true},
		{"the gateway", map[string]string{"subnet": "10.200.1.0/24", "gateway": "10.200.1.1"}, true},
		{"another mode", map[string]string{"mode": "usermode"}, false},
		{"another value", map[string]string{"icc": "true"}, false},
		{"another MTU", map[string]string{"mtu": "1400"}, false},
		{"another subnet", map[string]string{"subnet": "10.200.2.0/24"}, false},
		{"another gateway", map[string]string{"subnet": "10.200.1.0/24", "gateway": "10.200.1.2"}, false},
		{"an option of the other mode", map[string]string{"fastpath": "on"}, false},
		{"no option", map[string]string{"mood": "good"}, false},
		{"a wrong value", map[string]string{"mtu": "many"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Agrees(n, tt.raw); got != tt.want {
				t.Errorf("got %t, want %t", got, tt.want)
			}
		})
	}
}
