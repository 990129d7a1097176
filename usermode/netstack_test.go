package usermode

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// The pretend host's addresses, and those of the pretend container behind the TUN.
var (
	host4      = netip.MustParsePrefix("10.200.9.1/24")
	host6      = netip.MustParsePrefix("fd00:200:9::1/64")
	forbidden4 = netip.MustParseAddr("10.200.9.66") // what the resolver refuses
	guest4     = netip.MustParsePrefix("10.200.8.2/24")
	guest6     = netip.MustParsePrefix("fd00:200:8::2/64")
)

// bed is a netstack that runs on a TUN in a namespace of its own, the container, with the test's namespace as host.
type bed struct {
	container *netns.NS
	tun       *os.File
	netstack  *netstack
	stop      func() // ends run and checks what it returned
}

// variant is how a bed is made.
type variant struct {
	mtu     int
	offload bool
}

func (v variant) String() string { return fmt.Sprintf("mtu=%d,offload=%t", v.mtu, v.offload) }

var usual = variant{mtu: 1500, offload: true}

func testNetstackConfig(t testing.TB, v variant) netstackConfig {
	return netstackConfig{
		MTU:     v.mtu,
		Offload: v.offload,
		Resolve: func(a netip.Addr) (netip.Addr, bool) { return a, a != forbidden4 },
		Log:     slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
}

// testWriter writes to a test's log.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

func newBed(t testing.TB, v variant) *bed {
	t.Helper()
	nettest.NoLeaks(t)
	routines := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, routines) })
	nettest.Host(t, host4, host6)
	b := &bed{container: nettest.NewNS(t)}
	b.tun = addTestTUN(t, b.container, v)
	var err error
	if b.netstack, err = newNetstack(testNetstackConfig(t, v)); err != nil {
		t.Fatal(err)
	}
	b.stop = runNetstack(t, b.netstack, b.tun)
	return b
}

// runNetstack runs s until the test ends or the function that it returns is called.
func runNetstack(t testing.TB, s *netstack, tun *os.File) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx, tun) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("run: %v", err)
			}
		case <-time.After(20 * time.Second):
			panic("netstack does not stop")
		}
	}
	t.Cleanup(stop)
	return stop
}

// addTestTUN makes a TUN in ns, with an address of the container's and the default routes.
func addTestTUN(t testing.TB, ns *netns.NS, v variant) *os.File {
	t.Helper()
	const name = "tun0"
	var tun *os.File
	err := ns.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return fmt.Errorf("TUNSETIFF: %w", err)
		}
		if v.offload {
			if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
				return fmt.Errorf("TUNSETOFFLOAD: %w", err)
			}
		}
		tun = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tun.Close() })
	nettest.Handle(t, ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if err := h.LinkSetMTU(link, v.mtu); err != nil {
			return err
		}
		if err := h.LinkSetTxQLen(link, uplinkQueue); err != nil { // as the fabric's
			return err
		}
		for _, a := range []netip.Prefix{guest4, guest6} {
			if err := nettest.Addr(h, name, a); err != nil {
				return err
			}
			nettest.AwaitLocal(t, h, a.Addr())
		}
		for _, all := range []string{"0.0.0.0/0", "::/0"} {
			_, dst, _ := net.ParseCIDR(all)
			if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst}); err != nil {
				return fmt.Errorf("default route: %w", err)
			}
		}
		return nil
	})
	return tun
}

// dial connects from the container.
func (b *bed) dial(network string, to netip.AddrPort) (c net.Conn, err error) {
	err = b.container.Do(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second}
		c, err = d.Dial(network, to.String())
		return err
	})
	return c, err
}

func (b *bed) mustDial(t testing.TB, network string, to netip.AddrPort) net.Conn {
	t.Helper()
	c, err := b.dial(network, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

// listenTCP listens on the host, with serve called for each connection, which it closes.
func listenTCP(t testing.TB, addr netip.Addr, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(time.Minute))
				serve(c)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func TestNewNetstack(t *testing.T) {
	for _, mtu := range []int{0, 1279, 65536} {
		if _, err := newNetstack(testNetstackConfig(t, variant{mtu: mtu})); err == nil {
			t.Errorf("MTU %d was accepted", mtu)
		}
	}
	if _, err := newNetstack(netstackConfig{MTU: 1500}); err == nil {
		t.Error("a netstack without resolver was made")
	}
}

// Everything a netstack has open at one moment is gone when run returns.
func TestNetstackStops(t *testing.T) {
	b := newBed(t, usual)
	accepted := make(chan *net.TCPConn, 1)
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) { accepted <- c; <-release })
	conn := b.mustDial(t, "tcp", to)
	<-accepted
	// A connection that waits for the host, which does not read: its buffers are full.
	conn.SetWriteDeadline(time.Now().Add(time.Second))
	if n, err := conn.Write(make([]byte, 64<<20)); err == nil {
		t.Fatalf("the host's and netstack's buffers hold %d bytes", n)
	}
	flow := b.mustDial(t, "udp", netip.AddrPortFrom(host4.Addr(), 9))
	flow.Write([]byte("nobody reads this"))

	start := time.Now()
	b.stop()
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("run took %v to stop", d)
	}
	// The container learns of it at once.
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("read after the stop: %v, want a reset", err)
	}
}

func TestNetstackRunsAgain(t *testing.T) {
	b := newBed(t, usual)
	b.stop()
	s, err := newNetstack(testNetstackConfig(t, usual))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		stop := runNetstack(t, s, b.tun)
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) { c.Write([]byte("x")) })
		if _, err := b.mustDial(t, "tcp", to).Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if st := s.stats(); st.Conns != 1 || st.Pending != 0 || st.Refused != 0 {
			t.Errorf("%+v, want one connection", st)
		}
		stop()
		if st := s.stats(); st != (netstackStats{}) {
			t.Errorf("%+v after the end", st)
		}
	}
}

func TestNetstackReportsDeadTUN(t *testing.T) {
	s, err := newNetstack(testNetstackConfig(t, usual))
	if err != nil {
		t.Fatal(err)
	}
	ns := nettest.NewNS(t)
	tun := addTestTUN(t, ns, usual)
	done := make(chan error, 1)
	go func() { done <- s.run(t.Context(), tun) }()
	nettest.Handle(t, ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName("tun0")
		if err != nil {
			return err
		}
		return h.LinkDel(link)
	})
	select {
	case err := <-done:
		if err == nil {
			t.Error("run returned nil though its TUN is gone")
		}
	case <-time.After(5 * time.Second):
		t.Error("run goes on without a TUN")
	}
}
