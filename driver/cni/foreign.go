package cni

import (
	"context"

	"github.com/containernetworking/cni/pkg/skel"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
)

// foreign does what is left to do where a plugin before us in the chain has made the container's interface: it publishes the
// container's ports, by listeners of the daemon, which reach the container as any process of the host does.
func (c *adding) foreign(ctx context.Context) error {
	if name := c.ofTheInterface(); name != "" {
		return invalid("%s: %s was made by a plugin before usernet in the chain, so only ports are left to usernet; put usernet first for more", name, c.args.IfName)
	}
	if len(c.req.Ports) == 0 {
		return nil
	}
	at := indexOf(c.result, c.args)
	c.req.Network = control.NetworkSpec{ID: c.req.Network.ID, Name: c.req.Network.Name, Foreign: true}
	c.req.Sandbox, c.req.MAC, c.req.Names, c.req.Addresses = c.args.Netns, c.result.Interfaces[at].Mac, false, nil
	for _, ip := range c.result.IPs {
		if a := addr(ip.Address.IP); a.IsValid() && (ip.Interface == nil || *ip.Interface == at) {
			c.req.Addresses = append(c.req.Addresses, a)
		}
	}
	if len(c.req.Addresses) == 0 {
		return invalid("prevResult: %s has no address, so no port of it can be published", c.args.IfName)
	}
	_, err := c.attach(ctx)
	return err
}

// ofTheInterface is a key that is given and that is about the network or the container's interface; "" if there is none.
func (w wire) ofTheInterface() string {
	limits, err := limits(w.Runtime.Bandwidth)
	for _, k := range []struct {
		name  string
		given bool
	}{
		{"mode", w.Mode != ""}, {"mtu", w.MTU != 0}, {"bridge", w.Bridge != ""}, {"internal", w.Internal}, {"options", len(w.Options) > 0},
		{"subnet", w.Subnet != ""}, {"subnets", len(w.Subnets) > 0}, {"ipam", w.ipam() != ""}, {"ipMasq", w.IPMasq != nil},
		{"isDefaultGateway", w.IsDefaultGateway != nil}, {"portIsolation", w.PortIsolation}, {"bandwidth", err != nil || limits != driver.Limits{}},
	} {
		if k.given {
			return k.name
		}
	}
	return ""
}

// indexOf is the place of the container's interface in a result; -1: it is not there.
func indexOf(result *types100.Result, a *skel.CmdArgs) int {
	for i, itf := range result.Interfaces {
		if itf.Name == a.IfName && itf.Sandbox != "" {
			return i
		}
	}
	return -1
}
