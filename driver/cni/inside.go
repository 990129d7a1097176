package cni

import (
	"errors"
	"net/netip"
	"os"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/internal/dump"
)

// inside looks into a container's network namespace.
type inside struct{ *netlink.Handle }

func look(netns *os.File) (inside, error) {
	h, err := netlink.NewHandleAt(vnetns.NsHandle(netns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return inside{}, failed(types.ErrInvalidEnvironmentVariables, "CNI_NETNS: %s is no network namespace: %v", netns.Name(), err)
	}
	return inside{h}, nil
}

// link finds an interface of the container; nil: there is none of that name.
func (in inside) link(name string) (netlink.Link, error) {
	link, err := in.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	return link, err
}

// ours tells whether we have made an interface.
func ours(link netlink.Link) bool {
	return link.Type() == "veth" && link.Attrs().Alias == driver.LinkAlias
}

// compareInside tells how a container differs from what a result says of it: of the interface that is at that place, its
// addresses, and the container's routes. theirs says that there is an interface of that name that we have not made, which is
// not compared.
func compareInside(a *skel.CmdArgs, result *types100.Result, at int) (theirs bool, err error) {
	netns, err := openContainer(a)
	if err != nil {
		return false, err
	}
	defer netns.Close()
	in, err := look(netns)
	if err != nil {
		return false, err
	}
	defer in.Close()
	link, err := in.link(a.IfName)
	if err != nil {
		return false, err
	}
	want := result.Interfaces[at]
	switch have := link; {
	case have == nil:
		return false, differs("the container has no interface %s", want.Name)
	case !ours(have):
		return true, nil
	case want.Mac != "" && have.Attrs().HardwareAddr.String() != want.Mac:
		return false, differs("%s has the MAC address %s, not %s", want.Name, have.Attrs().HardwareAddr, want.Mac)
	case want.Mtu != 0 && have.Attrs().MTU != want.Mtu:
		return false, differs("%s has an MTU of %d, not %d", want.Name, have.Attrs().MTU, want.Mtu)
	case have.Attrs().RawFlags&unix.IFF_UP == 0:
		return false, differs("%s is down", want.Name)
	}
	if err := in.compareAddresses(link, result, at); err != nil {
		return false, err
	}
	return false, in.compareRoutes(result)
}

func (in inside) compareAddresses(link netlink.Link, result *types100.Result, at int) error {
	have, err := dump.Whole(func() ([]netlink.Addr, error) { return in.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	for _, ip := range result.IPs {
		if ip.Interface == nil || *ip.Interface != at {
			continue
		}
		want := prefix(ip.Address)
		if !slices.ContainsFunc(have, func(a netlink.Addr) bool { return prefix(*a.IPNet) == want }) {
			return differs("%s does not have the address %s", link.Attrs().Name, want)
		}
	}
	return nil
}

func (in inside) compareRoutes(result *types100.Result) error {
	if len(result.Routes) == 0 {
		return nil
	}
	have, err := dump.Whole(func() ([]netlink.Route, error) { return in.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	for _, r := range result.Routes {
		dst, gw := prefix(r.Dst), addr(r.GW)
		same := func(h netlink.Route) bool {
			return destination(h) == dst && (!gw.IsValid() || addr(h.Gw) == gw) && (r.Priority == 0 || h.Priority == r.Priority)
		}
		if !slices.ContainsFunc(have, same) {
			return differs("the container has no route to %s by %s", dst, gw)
		}
	}
	return nil
}

// destination is where a route of the kernel leads. A default route may have none.
func destination(r netlink.Route) netip.Prefix {
	if r.Dst != nil {
		return prefix(*r.Dst)
	}
	return netip.PrefixFrom(zero(r.Family == netlink.FAMILY_V4), 0)
}

// remove deletes the container's end of a veth pair of ours, and the pair with it.
func (in inside) remove(name string) error {
	link, err := in.link(name)
	if err != nil || link == nil || !ours(link) {
		return err
	}
	if err := in.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}
