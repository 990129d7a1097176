package config

import (
	"reflect"
	"slices"

	"github.com/usernet/usernet"
)

// Agrees tells whether a network is what raw asks for, which need not give all options: none that it gives is another one in n.
func Agrees(n usernet.Network, raw map[string]string) bool {
	values, err := canonical(raw)
	if err != nil {
		return false
	}
	have := n.Options
	have.MTU, have.Subnets = n.MTU(), nil
	want := have
	if mode, given := values["mode"]; given && mode != string(have.Mode) {
		return false
	}
	if err := apply(&want, values); err != nil {
		return false
	}
	subnets := want.Subnets
	want.Subnets = nil
	same := func(a, b usernet.Subnet) bool { return a.Prefix == b.Prefix && a.Gateway == b.Gateway }
	return reflect.DeepEqual(have, want) && (len(subnets) == 0 || slices.EqualFunc(subnets, n.Subnets, same))
}
