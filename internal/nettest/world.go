package nettest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
)

// Who is in the world that World makes.
var (
	Router4, Router6 = netip.MustParseAddr("10.200.11.2"), netip.MustParseAddr("fd00:200:11::2")
	Far4, Far6       = netip.MustParseAddr("10.200.12.2"), netip.MustParseAddr("fd00:200:12::2")
	Closed4, Closed6 = netip.MustParseAddr("10.200.13.1"), netip.MustParseAddr("fd00:200:13::1") // the router prohibits them
	Silent4          = netip.MustParseAddr("10.200.14.1")                                        // nothing comes back
)

// Narrow is the MTU of the link to the far host, in bytes.
const Narrow = 1400

// World makes a router next to the test's own namespace, and behind a narrow link a far host, until the test ends. Both send as many ICMP
// errors as there are reasons for.
func World(t testing.TB) (far *netns.NS) {
	t.Helper()
	var (
		near4, near6   = netip.MustParseAddr("10.200.11.1"), netip.MustParseAddr("fd00:200:11::1") // the test's namespace
		inner4, inner6 = netip.MustParseAddr("10.200.12.1"), netip.MustParseAddr("fd00:200:12::1") // the router, to the far host
	)
	router, far := NewNS(t), NewNS(t)
	for _, ns := range []*netns.NS{router, far} {
		Sysctl(t, ns, "net/ipv4/icmp_ratemask", "0")
		Sysctl(t, ns, "net/ipv6/icmp/ratelimit", "0")
	}
	Sysctl(t, router, "net/ipv4/ip_forward", "1")
	Sysctl(t, router, "net/ipv6/conf/all/forwarding", "1")
	Veth(t, "near", subnet(near4), router, "outer", subnet(Router4))
	Handle(t, router, func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "inner", Narrow
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(far.Fd()), PeerMTU: Narrow}
		if err := h.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		if err := addAddrs(h, "outer", Router6); err != nil {
			return err
		}
		for a, kind := range map[netip.Addr]int{Closed4: unix.RTN_PROHIBIT, Closed6: unix.RTN_PROHIBIT, Silent4: unix.RTN_BLACKHOLE} {
			if err := h.RouteAdd(&netlink.Route{Dst: ipNet(netip.PrefixFrom(a, a.BitLen())), Type: kind}); err != nil {
				return fmt.Errorf("add route to %s: %w", a, err)
			}
		}
		return addAddrs(h, "inner", inner4, inner6)
	})
	Handle(t, far, func(h *netlink.Handle) error {
		if err := addAddrs(h, "eth0", Far4, Far6); err != nil {
			return err
		}
		AwaitLocal(t, h, Far4)
		AwaitLocal(t, h, Far6)
		return addRoutes(h, inner4, inner6, near4, near6)
	})
	here, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	for ns, links := range map[*netns.NS][]string{here: {"near"}, router: {"outer", "inner"}, far: {"eth0"}} {
		for _, l := range links {
			AwaitUp(t, ns, l)
		}
	}
	Handle(t, here, func(h *netlink.Handle) error {
		if err := addAddrs(h, "near", near6); err != nil {
			return err
		}
		return addRoutes(h, Router4, Router6, Far4, Far6, Closed4, Closed6, Silent4)
	})
	return far
}

// subnet is the one that a is in.
func subnet(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(a, 24)
	}
	return netip.PrefixFrom(a, 64)
}

func addAddrs(h *netlink.Handle, link string, addrs ...netip.Addr) error {
	for _, a := range addrs {
		if err := Addr(h, link, subnet(a)); err != nil {
			return err
		}
	}
	return nil
}

// addRoutes adds routes to the subnets of addresses.
func addRoutes(h *netlink.Handle, via4, via6 netip.Addr, to ...netip.Addr) error {
	for _, a := range to {
		via := via6
		if a.Is4() {
			via = via4
		}
		if err := h.RouteAdd(&netlink.Route{Dst: ipNet(subnet(a).Masked()), Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("add route to %s via %s: %w", a, via, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Sysctl writes a setting of ns. name is its path below /proc/sys.
func Sysctl(t testing.TB, ns *netns.NS, name, value string) {
	t.Helper()
	if err := ns.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644) }); err != nil {
		t.Fatal(err)
	}
}

// AwaitUp waits until the kernel has a link in ns running: it takes a moment, and what is sent before is lost.
func AwaitUp(t testing.TB, ns *netns.NS, name string) {
	t.Helper()
	Handle(t, ns, func(h *netlink.Handle) error {
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			link, err := h.LinkByName(name)
			if err != nil || link.Attrs().OperState == netlink.OperUp {
				return err
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s is %s", name, link.Attrs().OperState)
			}
		}
	})
}
