package hostnet

import (
	"testing"

	"github.com/vishvananda/netlink"
)

// Kinds of ports that a test machine may not be able to make.
func TestEvaluatePorts(t *testing.T) {
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0", Index: 1}}
	port := func(i int) netlink.LinkAttrs { return netlink.LinkAttrs{Name: "port", Index: 1 + i, MasterIndex: 1} }
	veth := &netlink.Veth{LinkAttrs: port(1)}
	for _, tt := range []struct {
		name  string
		ports []netlink.Link
		want  bool
	}{
		{"none", nil, true},
		{"container", []netlink.Link{veth}, true},
		{"virtual machine", []netlink.Link{&netlink.Tuntap{LinkAttrs: port(1)}, &netlink.Dummy{LinkAttrs: port(2)}}, true},
		{"overlay", []netlink.Link{veth, &netlink.Vxlan{LinkAttrs: port(2)}}, true},
		{"network card", []netlink.Link{&netlink.Device{LinkAttrs: port(1)}}, false},
		{"network card and container", []netlink.Link{veth, &netlink.Device{LinkAttrs: port(2)}}, false},
		{"bond", []netlink.Link{&netlink.Bond{LinkAttrs: port(1)}}, false},
		{"VLAN", []netlink.Link{&netlink.Vlan{LinkAttrs: port(1)}}, false},
		{"unknown", []netlink.Link{&netlink.GenericLink{LinkAttrs: port(1), LinkType: "dsa"}}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := evaluate(append(tt.ports, br), nil, func(string) bool { return false })
			if got := len(s.bridges) == 1; got != tt.want {
				t.Errorf("counts as a container bridge: %t, want %t", got, tt.want)
			}
		})
	}
}
