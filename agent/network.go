package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// settings are what DHCP says of a network. The zero value is that it says nothing.
type settings struct {
	addr   netip.Prefix
	routes []route
	mtu    int // 0: as it is
	dns    []netip.Addr
	search []string
}

// route is a way to dst, or on the link if via is zero.
type route struct {
	dst netip.Prefix
	via netip.Addr
}

func (r route) String() string {
	if !r.via.IsValid() {
		return r.dst.String()
	}
	return fmt.Sprintf("%s via %s", r.dst, r.via)
}

// network is what has been configured on the TAP. It is for one goroutine at a time.
type network struct {
	cfg   Config
	link  netlink.Link
	is    settings
	stale []netip.Prefix // addresses to be removed
	file  *resolvConf    // nil: not touched
}

// set changes the TAP's configuration to want, and may be repeated. What is the same stays, and so do connections.
func (n *network) set(want settings) error {
	if err := n.setMTU(want.mtu); err != nil {
		return err
	}
	if want.addr.IsValid() {
		if err := netlink.AddrReplace(n.link, &netlink.Addr{IPNet: ipNet(want.addr)}); err != nil {
			return fmt.Errorf("add %s to %s: %w", want.addr, n.cfg.Interface, err)
		}
	}
	if n.is.addr.IsValid() && n.is.addr != want.addr {
		n.stale = append(n.stale, n.is.addr)
	}
	n.is.addr = want.addr
	// Former addresses go last: with an interface's only address, the kernel removes its routes.
	return errors.Join(n.setRoutes(want.routes), n.clean(), n.resolve(want))
}

// clean removes former addresses.
func (n *network) clean() error {
	var errs []error
	n.stale = slices.DeleteFunc(n.stale, func(a netip.Prefix) bool {
		if a == n.is.addr {
			return true // it has come back
		}
		err := netlink.AddrDel(n.link, &netlink.Addr{IPNet: ipNet(a)})
		if err == nil || errors.Is(err, unix.EADDRNOTAVAIL) || gone(err) {
			return true
		}
		errs = append(errs, fmt.Errorf("remove %s from %s: %w", a, n.cfg.Interface, err))
		return false
	})
	return errors.Join(errs...)
}

// setMTU leaves the MTU as it is for 0, or if it was said by whoever started the agent.
func (n *network) setMTU(mtu int) error {
	if mtu > 0 && mtu != n.is.mtu && n.cfg.MTU == 0 {
		if err := netlink.LinkSetMTU(n.link, mtu); err != nil {
			return fmt.Errorf("set mtu of %s to %d: %w", n.cfg.Interface, mtu, err)
		}
	}
	n.is.mtu = mtu
	return nil
}

// setRoutes removes before it adds, since there may be only one route to a destination. Somebody else's is an error.
func (n *network) setRoutes(want []route) error {
	for _, r := range slices.Clone(n.is.routes) {
		if slices.Contains(want, r) {
			continue
		}
		if err := netlink.RouteDel(n.route(r)); err != nil && !errors.Is(err, unix.ESRCH) && !gone(err) {
			return fmt.Errorf("remove route %s: %w", r, err)
		}
		n.is.routes = slices.DeleteFunc(n.is.routes, func(o route) bool { return o == r })
	}
	for _, r := range want {
		if slices.Contains(n.is.routes, r) {
			continue
		}
		if err := netlink.RouteAdd(n.route(r)); err != nil {
			return fmt.Errorf("add route %s by %s: %w", r, n.cfg.Interface, err)
		}
		n.is.routes = append(n.is.routes, r)
	}
	return nil
}

// resolve changes resolv.conf.
func (n *network) resolve(want settings) error {
	same := slices.Equal(n.is.dns, want.dns) && slices.Equal(n.is.search, want.search)
	if n.cfg.ResolvConf == "" || same && (n.file != nil) == (len(want.dns) > 0) {
		return nil
	}
	if len(want.dns) == 0 {
		if n.file == nil {
			return nil
		}
		if err := n.file.restore(); err != nil {
			return err
		}
		n.file, n.is.dns, n.is.search = nil, nil, nil
		return nil
	}
	if n.file == nil {
		n.file = &resolvConf{path: n.cfg.ResolvConf}
	}
	if err := n.file.write(want.dns, want.search); err != nil {
		return err
	}
	n.is.dns, n.is.search = want.dns, want.search
	return nil
}

func (n *network) route(r route) *netlink.Route {
	nr := &netlink.Route{LinkIndex: n.link.Attrs().Index, Dst: ipNet(r.dst), Protocol: unix.RTPROT_DHCP, Scope: netlink.SCOPE_LINK}
	if r.via.IsValid() {
		nr.Gw, nr.Scope = r.via.AsSlice(), netlink.SCOPE_UNIVERSE
		// DHCP may name a gateway outside of the subnet, which is then on the link (RFC 3442).
		nr.Flags = int(netlink.FLAG_ONLINK)
	}
	return nr
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func (s settings) String() string {
	var b strings.Builder
	fmt.Fprint(&b, s.addr)
	for _, r := range s.routes {
		fmt.Fprintf(&b, ", %s", r)
	}
	fmt.Fprintf(&b, ", mtu %d, dns %v", s.mtu, s.dns)
	return b.String()
}
