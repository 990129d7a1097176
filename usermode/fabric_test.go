package usermode

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// openAndHang names the directory in which this very program, run as another process, opens the fabric of testConfig.
const openAndHang = "USERNET_TEST_OPEN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(openAndHang); dir != "" {
		g, err := Open(testConfig(dir))
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("open")
		bufio.NewReader(os.Stdin).ReadByte() // until killed
		g.Close()
	}
	os.Exit(nettest.Main(m))
}

var (
	gateway4   = netip.MustParsePrefix("10.200.1.1/24")
	gateway6   = netip.MustParsePrefix("fd00:200:1::1/64")
	container4 = netip.MustParsePrefix("10.200.1.2/24")
	container6 = netip.MustParsePrefix("fd00:200:1::2/64")
)

func testConfig(dir string) Config {
	return Config{
		ID:     strings.Repeat("0123456789abcdef", 4),
		Dir:    dir,
		Bridge: "br0",
		Subnets: []usernet.Subnet{
			{Prefix: gateway4.Masked(), Gateway: gateway4.Addr()},
			{Prefix: gateway6.Masked(), Gateway: gateway6.Addr()},
		},
	}
}

// openFabric opens a gateway that goes with the test, and checks that nothing of it stays.
func openFabric(t testing.TB, cfg Config) *Gateway {
	t.Helper()
	nettest.NoLeaks(t)
	routines := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, routines) })
	g, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if err := Remove(cfg.Dir, cfg.ID); err != nil {
			t.Error(err)
		}
	})
	return g
}

// addBridge makes the bridge that package endpoint makes, with the gateway addresses.
func addBridge(t testing.TB, g *Gateway) {
	t.Helper()
	nettest.Handle(t, g.Netns(), func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = g.cfg.Bridge
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		for _, a := range []netip.Prefix{gateway4, gateway6} {
			if err := nettest.Addr(h, attrs.Name, a); err != nil {
				return err
			}
		}
		return nil
	})
}

// addContainer makes a pretend container on the bridge.
func addContainer(t testing.TB, g *Gateway, name string, addrs ...netip.Prefix) *netns.NS {
	t.Helper()
	ns := nettest.NewNS(t)
	nettest.Handle(t, g.Netns(), func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}); err != nil {
			return fmt.Errorf("add veth %s: %w", name, err)
		}
		bridge, err := h.LinkByName(g.cfg.Bridge)
		if err != nil {
			return err
		}
		veth, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if err := h.LinkSetMaster(veth, bridge); err != nil {
			return err
		}
		return h.LinkSetUp(veth)
	})
	nettest.Handle(t, ns, func(h *netlink.Handle) error {
		for _, a := range addrs {
			if err := nettest.Addr(h, "eth0", a); err != nil {
				return err
			}
			family, gw := unix.AF_INET, gateway4
			if a.Addr().Is6() {
				family, gw = unix.AF_INET6, gateway6
			}
			route := &netlink.Route{Family: family, Dst: everywhere(family), Gw: gw.Addr().AsSlice()}
			if err := h.RouteAdd(route); err != nil {
				return fmt.Errorf("add default route via %s: %w", gw.Addr(), err)
			}
		}
		return nil
	})
	nettest.AwaitUp(t, g.Netns(), name)
	nettest.AwaitUp(t, ns, "eth0")
	return ns
}

// inside runs f in ns and returns its result.
func inside[T any](t *testing.T, ns *netns.NS, f func() (T, error)) T {
	t.Helper()
	var v T
	err := ns.Do(func() (err error) { v, err = f(); return err })
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// A br_netfilter that is loaded late starts with its own defaults in every namespace.
func TestRepair(t *testing.T) {
	g := openFabric(t, testConfig(t.TempDir()))
	for _, s := range bridgeSysctls {
		inside(t, g.Netns(), func() (any, error) {
			path := "/proc/sys/" + s.name
			if _, err := os.Stat(path); err != nil {
				return nil, nil // the kernel has no such thing, and nothing to repair
			}
			return nil, os.WriteFile(path, []byte("1"), 0)
		})
	}
	if err := g.Repair(); err != nil {
		t.Fatal(err)
	}
	for _, s := range bridgeSysctls {
		got := inside(t, g.Netns(), func() (string, error) {
			b, err := os.ReadFile("/proc/sys/" + s.name)
			if errors.Is(err, fs.ErrNotExist) {
				return "0", nil
			}
			return strings.TrimSpace(string(b)), err
		})
		if got != "0" {
			t.Errorf("%s is %s after the repair", s.name, got)
		}
	}
}
