package cni

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/driver/control"
)

// dhcp is the IPAM plugin that asks a server on the LAN, by the container's interface: that has to be there before. The LAN is
// that of a bridge of the host, and the daemon knows no address of it.
const dhcp = "dhcp"

// late puts a container on the LAN of a bridge and then asks for an address.
func (c *adding) late(ctx context.Context) (err error) {
	switch {
	case c.Mode != "bridge" || c.Bridge == "":
		return invalid("ipam dhcp: it needs mode bridge, and as bridge that of the host that the server is on")
	case len(c.req.Ports) > 0:
		return invalid("ipam dhcp: no ports are published of a container on a LAN; it has an address there")
	case c.Subnet != "" || len(c.Subnets) > 0:
		return invalid("ipam dhcp: the subnets are the server's business")
	}
	c.req.Network.Unaddressed, c.req.Names = true, false
	got, err := c.attach(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			client := control.NewClient(c.plugin.Daemon.Socket)
			err = errors.Join(coded(err), client.Detach(context.WithoutCancel(ctx), c.req.Network.ID, c.req.ID, c.netns))
		}
	}()
	lease, err := c.lease(ctx, c.args.StdinData)
	if err != nil {
		return err
	}
	if err := configure(c.netns, c.args.IfName, lease); err != nil {
		return errors.Join(coded(err), c.release(ctx, c.args.StdinData))
	}
	extend(c.result, c.args, c.req, got)
	ours := types100.Int(indexOf(c.result, c.args))
	for _, ip := range lease.IPs {
		c.result.IPs = append(c.result.IPs, &types100.IPConfig{Interface: ours, Address: ip.Address, Gateway: ip.Gateway})
	}
	c.result.Routes = append(c.result.Routes, lease.Routes...)
	c.result.DNS = c.resolvers(c.result.DNS, lease, got)
	return nil
}

// configure gives a container's interface the addresses and the routes of a lease.
func configure(netns *os.File, ifName string, lease *types100.Result) error {
	in, err := look(netns)
	if err != nil {
		return err
	}
	defer in.Close()
	link, err := in.link(ifName)
	if err != nil {
		return err
	}
	if link == nil {
		return failed(types.ErrUnknownContainer, "the container has no interface %s any more", ifName)
	}
	for _, ip := range lease.IPs {
		if err := in.AddrAdd(link, &netlink.Addr{IPNet: &ip.Address}); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add %s to %s: %w", ip.Address.String(), ifName, err)
		}
	}
	for _, r := range lease.Routes {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: &r.Dst, Gw: r.GW, Priority: r.Priority}
		if err := in.RouteAdd(route); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add route to %s by %s: %w", r.Dst.String(), ifName, err)
		}
	}
	return nil
}
