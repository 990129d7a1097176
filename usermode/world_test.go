package usermode

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/splice"
)

// runGateway runs g until the test ends or the function that it returns is called.
func runGateway(t testing.TB, g *Gateway) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := g.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// dialFrom connects from ns to the address.
func dialFrom(ns *netns.NS, network string, to netip.AddrPort, timeout time.Duration) (c net.Conn, err error) {
	err = ns.Do(func() (err error) { c, err = net.DialTimeout(network, to.String(), timeout); return err })
	return c, err
}

// The whole way: container, bridge, TUN, network stack, socket on the host.
func TestContainerReachesTheHost(t *testing.T) {
	for name, set := range map[string]func(*Config){
		"netstack":                  func(*Config) {},
		"netstack without offload":  func(c *Config) { c.NoOffload = true },
		"fast path":                 func(c *Config) { c.FastPath = true },
		"fast path without offload": func(c *Config) { c.FastPath, c.NoOffload = true, true },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t.TempDir())
			set(&cfg)
			cfg.Log = slog.New(slog.NewTextHandler(testWriter{t}, nil))
			g := openFabric(t, cfg)
			nettest.Host(t, host4, host6)
			addBridge(t, g)
			ns := addContainer(t, g, "c1", container4, container6)
			runGateway(t, g)
			for _, addr := range []netip.Addr{host4.Addr(), host6.Addr()} {
				c, err := dialFrom(ns, "tcp", listenTCP(t, addr, echoTCP), 5*time.Second)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				echoed(t, c, 4<<20)
				u, err := dialFrom(ns, "udp", listenUDP(t, addr), 0)
				if err != nil {
					t.Fatal(err)
				}
				defer u.Close()
				answered(t, u, "a datagram")
			}
		})
	}
}

// echoed sends size bytes over c and checks that they come back.
func echoed(t *testing.T, c net.Conn, size int64) {
	t.Helper()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, noise(1, size))
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, n := sum(t, c)
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if want, _ := sum(t, noise(1, size)); got != want {
		t.Errorf("%d bytes went, %d came back or were not the same", size, n)
	}
}

// answered sends a datagram and checks that it comes back.
func answered(t *testing.T, c net.Conn, text string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := c.Read(b); err != nil || string(b[:n]) != text {
		t.Fatalf("received %q, %v, want %q", b[:n], err, text)
	}
}

// Nothing a container sends may arrive at what the host keeps for itself, though somebody listens there.
func TestContainerDoesNotReach(t *testing.T) {
	blocked, metadata := netip.MustParsePrefix("10.200.2.0/24"), netip.MustParsePrefix("169.254.169.254/32")
	cfg := testConfig(t.TempDir())
	cfg.Blocked = blocked.Contains
	g := openFabric(t, cfg)
	nettest.Host(t, host4, host6)
	nettestAddr(t, "pretendhost", netip.PrefixFrom(blocked.Addr().Next(), 24), metadata)
	addBridge(t, g)
	ns := addContainer(t, g, "c1", container4, container6)
	routeLoopback(t, ns)
	runGateway(t, g)
	arrived := make(chan string, 100)
	for _, addr := range []netip.Addr{
		netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback(), blocked.Addr().Next(), metadata.Addr(),
	} {
		to := listenTCP(t, addr, func(c *net.TCPConn) { arrived <- c.LocalAddr().String() })
		if c, err := dialFrom(ns, "tcp", to, 500*time.Millisecond); err == nil {
			t.Errorf("connected to %s", to)
			c.Close()
		}
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(to))
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		go func() {
			if _, _, err := u.ReadFrom(make([]byte, 1)); err == nil {
				arrived <- u.LocalAddr().String()
			}
		}()
		if c, err := dialFrom(ns, "udp", to, 0); err == nil {
			c.Write([]byte("x"))
			c.Close()
		}
	}
	// What is allowed, and was sent later, has come through: so would have the rest.
	c, err := dialFrom(ns, "udp", listenUDP(t, host4.Addr()), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answered(t, c, "allowed")
	select {
	case where := <-arrived:
		t.Errorf("something arrived at %s", where)
	default:
	}
}

// A made-up address does not get out of the network.
func TestContainerCannotMakeUpItsAddress(t *testing.T) {
	eachPath(t, func(t *testing.T, _ *Gateway, ns *netns.NS) {
		made := netip.MustParseAddr("10.200.77.7")
		err := ns.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: made.AsSlice(), Mask: net.CIDRMask(32, 32)}})
		})
		if err != nil {
			t.Fatal(err)
		}
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(host4.Addr(), 0)))
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		send := func(from netip.Addr, text string) {
			t.Helper()
			err := ns.Do(func() error {
				c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), u.LocalAddr().(*net.UDPAddr))
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = io.WriteString(c, text)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		send(made, "made up")
		send(container4.Addr(), "true") // what was sent before would be there before
		u.SetReadDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 100)
		if n, _, err := u.ReadFrom(b); err != nil || string(b[:n]) != "true" {
			t.Errorf("received %q, %v, want what has a true address", b[:n], err)
		}
	})
}

// nettestAddr gives a link of the test's namespace further addresses.
func nettestAddr(t *testing.T, link string, addrs ...netip.Prefix) {
	t.Helper()
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, a := range addrs {
		if err := nettest.Addr(h, link, a); err != nil {
			t.Fatal(err)
		}
	}
}

// routeLoopback makes a hostile container: its packets to loopback addresses leave it.
func routeLoopback(t *testing.T, ns *netns.NS) {
	t.Helper()
	err := ns.Do(func() error {
		return setSysctls([]sysctl{{name: "net/ipv4/conf/all/route_localnet", value: "1"}})
	})
	if err != nil {
		t.Fatal(err)
	}
	nettest.Handle(t, ns, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := h.LinkSetDown(lo); err != nil {
			return err
		}
		for _, route := range []struct{ dst, via netip.Prefix }{
			{netip.MustParsePrefix("127.0.0.0/8"), gateway4},
			{netip.MustParsePrefix("::1/128"), gateway6},
		} {
			_, dst, err := net.ParseCIDR(route.dst.String())
			if err != nil {
				return err
			}
			if err := h.RouteReplace(&netlink.Route{Dst: dst, Gw: route.via.Addr().AsSlice()}); err != nil {
				return err
			}
		}
		return nil
	})
}

// The successor of a daemon takes up what containers send, even what they began while there was none.
func TestTrafficAfterRestart(t *testing.T) {
	cfg := testConfig(t.TempDir())
	g := openFabric(t, cfg)
	nettest.Host(t, host4, host6)
	addBridge(t, g)
	ns := addContainer(t, g, "c1", container4, container6)
	to := listenTCP(t, host4.Addr(), echoTCP)
	stop := runGateway(t, g)
	c, err := dialFrom(ns, "tcp", to, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	echoed(t, c, 1000)
	c.Close()
	stop()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}

	f, err := connectFrom(ns, to)
	if err != nil {
		t.Fatalf("connect while there is no gateway: %v", err)
	}
	defer f.Close()
	again, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	defer runGateway(t, again)()
	if err := connected(int(f.Fd()), 10*time.Second); err != nil {
		t.Errorf("the connection begun before the restart: %v", err)
	}
}

// connectFrom begins to connect from ns.
func connectFrom(ns *netns.NS, to netip.AddrPort) (f *os.File, err error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	err = ns.Do(func() error {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, splice.Sockaddr(to)); err != unix.EINPROGRESS {
			unix.Close(fd)
			return err
		}
		f = os.NewFile(uintptr(fd), to.String())
		return nil
	})
	return f, err
}
