//go:build linux

package flows

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nettest"
)

// The world beyond the pretend host: a router, and behind a narrow link, a far host.
var (
	near4, near6     = netip.MustParsePrefix("10.200.11.1/24"), netip.MustParsePrefix("fd00:200:11::1/64") // the host
	router4, router6 = netip.MustParsePrefix("10.200.11.2/24"), netip.MustParsePrefix("fd00:200:11::2/64")
	inner4, inner6   = netip.MustParsePrefix("10.200.12.1/24"), netip.MustParsePrefix("fd00:200:12::1/64") // the router again
	far4, far6       = netip.MustParsePrefix("10.200.12.2/24"), netip.MustParsePrefix("fd00:200:12::2/64")
	closed4, closed6 = netip.MustParsePrefix("10.200.13.0/24"), netip.MustParsePrefix("fd00:200:13::/64") // prohibited
	silent4          = netip.MustParseAddr("10.200.14.1")                                                 // nothing comes back
)

const narrow = 1400 // bytes, the MTU of the link to the far host

// timeExceeded is what a router says where a packet has no hops left.
func timeExceeded(v4 bool) icmperror.Message {
	if v4 {
		return icmperror.Message{Type: uint8(ipv4.ICMPTypeTimeExceeded)}
	}
	return icmperror.Message{Type: uint8(ipv6.ICMPTypeTimeExceeded)}
}

// namespace is a network namespace.
type namespace interface{ Do(func() error) error }

// addWorld makes the router and the far host.
func addWorld(t *testing.T) namespace {
	t.Helper()
	router, far := nettest.NewNS(t), nettest.NewNS(t)
	inside(t, router, func() {
		// As many errors as there are reasons for.
		writeSysctl(t, "net/ipv4/icmp_ratemask", "0")
		writeSysctl(t, "net/ipv6/icmp/ratelimit", "0")
		writeSysctl(t, "net/ipv4/ip_forward", "1")
		writeSysctl(t, "net/ipv6/conf/all/forwarding", "1")
	})
	nettest.Veth(t, "near", near4, router, "outer", router4)
	here, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if err := nettest.Addr(here, "near", near6); err != nil {
		t.Fatal(err)
	}
	nettest.Handle(t, router, func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "inner", narrow
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(far.Fd()), PeerMTU: narrow}
		if err := h.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		if err := nettest.Addr(h, "outer", router6); err != nil {
			return err
		}
		for _, p := range []netip.Prefix{closed4, closed6} {
			if err := h.RouteAdd(&netlink.Route{Dst: ipNet(p), Type: unix.RTN_PROHIBIT}); err != nil {
				return fmt.Errorf("add prohibited route: %w", err)
			}
		}
		if err := h.RouteAdd(&netlink.Route{Dst: ipNet(netip.PrefixFrom(silent4, 32)), Type: unix.RTN_BLACKHOLE}); err != nil {
			return fmt.Errorf("add blackhole: %w", err)
		}
		if err := nettest.Addr(h, "inner", inner4); err != nil {
			return err
		}
		return nettest.Addr(h, "inner", inner6)
	})
	nettest.Handle(t, far, func(h *netlink.Handle) error {
		for _, a := range []netip.Prefix{far4, far6} {
			if err := nettest.Addr(h, "eth0", a); err != nil {
				return err
			}
		}
		return addRoutes(h, inner4.Addr(), inner6.Addr(), near4.Masked(), near6.Masked())
	})
	for _, to := range [][2]netip.Prefix{{far4.Masked(), far6.Masked()}, {closed4, closed6}} {
		if err := addRoutes(here, router4.Addr(), router6.Addr(), to[0], to[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := here.RouteAdd(&netlink.Route{Dst: ipNet(netip.PrefixFrom(silent4, 32)), Gw: router4.Addr().AsSlice()}); err != nil {
		t.Fatal(err)
	}
	for _, a := range []netip.Addr{far4.Addr(), far6.Addr()} {
		await(t, func() bool { return reaches(a) })
	}
	return far
}

// reaches tells whether the far host is there yet: a link needs a moment.
func reaches(a netip.Addr) bool {
	c, err := net.Dial("tcp", netip.AddrPortFrom(a, 1).String())
	if err == nil {
		c.Close()
	}
	return err == nil || isRefusedTCP(err)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func addRoutes(h *netlink.Handle, via4, via6 netip.Addr, to4, to6 netip.Prefix) error {
	for via, to := range map[netip.Addr]netip.Prefix{via4: to4, via6: to6} {
		if err := h.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("add route %s via %s: %w", to, via, err)
		}
	}
	return nil
}

// inside runs f in ns.
func inside(t *testing.T, ns namespace, f func()) {
	t.Helper()
	if err := ns.Do(func() error { f(); return nil }); err != nil {
		t.Fatal(err)
	}
}

func writeSysctl(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
		t.Error(err)
	}
}

// setSysctl sets a sysctl until the test ends.
func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	old, err := os.ReadFile(filepath.Join("/proc/sys", name))
	if err != nil {
		t.Fatal(err)
	}
	writeSysctl(t, name, value)
	t.Cleanup(func() { writeSysctl(t, name, string(old)) })
}

// unprivileged runs f on a thread that has no capabilities.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never again anything else on it
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		err := unix.Capset(&header, &none[0])
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
