package vmnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/nettest/load"
	"github.com/usernet/usernet/usermode/l2"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// The network, and the pretend host's addresses in the world.
var (
	gatewayMAC = l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd}
	subnet     = netip.MustParsePrefix("192.168.127.0/24")
	gateway    = netip.MustParseAddr("192.168.127.1")
	subnet6    = netip.MustParsePrefix("fd75:6e65:74:7f::/64")
	gateway6   = netip.MustParseAddr("fd75:6e65:74:7f::1")
	alias      = netip.MustParseAddr("192.168.127.254")
	virtualIP  = netip.MustParseAddr("192.168.127.253")

	host4 = netip.MustParsePrefix("10.200.9.1/24")
	host6 = netip.MustParsePrefix("fd00:200:9::1/64")
)

func testConfig(t testing.TB) Config {
	return Config{
		MTU: 1500, MAC: gatewayMAC, Subnet: subnet, Gateway: gateway, Subnet6: subnet6, Gateway6: gateway6,
		VirtualIPs: []netip.Addr{virtualIP}, NAT: map[netip.Addr]netip.Addr{alias: netip.MustParseAddr("127.0.0.1")},
		Search: []string{"example.com"}, Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
}

// testWriter writes to a test's log.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

// bed is a network that runs, with the test's namespace as host.
type bed struct {
	*Network
	t    testing.TB
	stop func()
	wg   sync.WaitGroup
	ctx  context.Context // of the ports
	room int             // bytes of a new port's stream that the machine need not have read; 0: what l2 makes it
}

func newBed(t testing.TB, cfg Config) *bed {
	t.Helper()
	nettest.NoLeaks(t)
	routines := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, routines) })
	nettest.Host(t, host4, host6)
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &bed{Network: n, t: t, ctx: ctx}
	running, stopRunning := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(running) }()
	b.stop = sync.OnceFunc(func() {
		stopRunning()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			panic("the network does not stop")
		}
	})
	t.Cleanup(func() {
		b.stop()
		cancel()
		b.wg.Wait()
	})
	return b
}

func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not come about that %s", what)
		}
	}
}

// port runs a port on a stream and returns the machine's end.
func (b *bed) port(framing l2.Framing, mtu int) (machine *net.UnixConn, p *l2.Port, end func()) {
	b.t.Helper()
	host, machine, err := socketpair()
	if err != nil {
		b.t.Fatal(err)
	}
	opts := l2.Options{Framing: framing, MTU: mtu}
	if framing == l2.Usernet {
		opts.Takes = l2.AllOffload
	}
	link := l2.Stream(host, opts)
	if b.room > 0 {
		host.SetWriteBuffer(b.room)
	}
	p = b.sw.NewPort(link, l2.PortConfig{})
	ctx, cancel := context.WithCancel(b.ctx)
	done := make(chan struct{})
	b.wg.Go(func() {
		defer close(done)
		p.Run(ctx)
	})
	eventually(b.t, "the port runs", func() bool {
		for _, o := range b.sw.Ports() {
			if o == p {
				return true
			}
		}
		return false
	})
	return machine, p, func() { cancel(); <-done }
}

func socketpair() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	return conns[0].(*net.UnixConn), conns[1].(*net.UnixConn), nil
}

// machine is one: a namespace with a network card.
type machine struct {
	t    testing.TB
	ns   *netns.NS
	mtu  int
	addr netip.Addr
	out  func() // unplugs it
	die  func() // ends its helper, in such a way that the network does not learn of it before out

	helper *os.Process
}

// pause makes its helper stand still.
func (m *machine) pause() { m.helper.Signal(syscall.SIGSTOP) }

func (m *machine) resume() { m.helper.Signal(syscall.SIGCONT) }

// hang pauses the machine in the middle of receiving from source, and returns when frames wait that its stream has no room for.
func (m *machine) hang(b *bed, source netip.AddrPort) {
	m.t.Helper()
	for range 8 {
		c := m.mustDial("tcp", source)
		if _, err := io.ReadFull(c, make([]byte, 1<<20)); err != nil {
			m.t.Fatal(err)
		}
		go io.Copy(io.Discard, c)
	}
	m.pause()
	m.t.Cleanup(m.resume) // also if that does not come about
	eventually(m.t, "frames wait for it", func() bool { return len(*b.link.outboxes.Load()) == 1 })
}

// machine makes machine i, with the address 192.168.127.i and one by router advertisement.
func (b *bed) machine(i int, framing l2.Framing) *machine {
	b.t.Helper()
	m := b.machineWithoutAddr(framing)
	m.addr = netip.AddrFrom4([4]byte{192, 168, 127, byte(i)})
	m.setAddr()
	return m
}

func (b *bed) machineWithoutAddr(framing l2.Framing) *machine {
	b.t.Helper()
	m := &machine{t: b.t, ns: nettest.NewNS(b.t), mtu: b.cfg.MTU}
	m.plug(b, framing)
	return m
}

// plug connects the machine to a port, as when its helper starts.
func (m *machine) plug(b *bed, framing l2.Framing) *l2.Port {
	m.t.Helper()
	conn, p, end := b.port(framing, m.mtu)
	f, err := conn.File()
	if err != nil {
		m.t.Fatal(err)
	}
	conn.Close()
	helper := load.Start(m.t, m.ns, []*os.File{f}, "machine", framing)
	m.helper = helper.Process
	m.t.Cleanup(func() { f.Close() })
	if line := helper.Line(); line != "ready" {
		m.t.Fatal(line)
	}
	m.die = helper.Stop
	m.out = func() { helper.Stop(); f.Close(); end() }
	return p
}

// up brings the card up.
func (m *machine) up() {
	m.t.Helper()
	m.sysctl("net/ipv6/conf/eth0/dad_transmits", "0")
	m.sysctl("net/ipv6/conf/eth0/router_solicitation_delay", "0")
	nettest.Handle(m.t, m.ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(tapName)
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetMTU(link, m.mtu), h.LinkSetTxQLen(link, 1000), h.LinkSetUp(link))
	})
}

func (m *machine) setAddr() {
	m.t.Helper()
	m.up()
	nettest.Handle(m.t, m.ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(tapName)
		if err != nil {
			return err
		}
		if err := nettest.Addr(h, tapName, netip.PrefixFrom(m.addr, 24)); err != nil {
			return err
		}
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: gateway.AsSlice()})
	})
}

func (m *machine) sysctl(name, value string) {
	m.t.Helper()
	nettest.Sysctl(m.t, m.ns, name, value)
}

// addr6 waits for the address that the machine makes itself.
func (m *machine) addr6() (found netip.Addr) {
	m.t.Helper()
	eventually(m.t, "the machine has an IPv6 address", func() bool {
		nettest.Handle(m.t, m.ns, func(h *netlink.Handle) error {
			link, err := h.LinkByName(tapName)
			if err != nil {
				return err
			}
			addrs, err := h.AddrList(link, netlink.FAMILY_V6)
			for _, a := range addrs {
				if ip, _ := netip.AddrFromSlice(a.IP); subnet6.Contains(ip) && a.Flags&unix.IFA_F_TENTATIVE == 0 {
					found = ip
				}
			}
			return err
		})
		return found.IsValid()
	})
	return found
}

// run runs a command in the machine.
func (m *machine) run(args ...string) (string, error) {
	var out []byte
	err := m.ns.Do(func() (err error) {
		out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// dial connects from the machine.
func (m *machine) dial(network string, to netip.AddrPort) (c net.Conn, err error) {
	err = m.ns.Do(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second}
		d.SetMultipathTCP(false)
		c, err = d.Dial(network, to.String())
		return err
	})
	if err == nil {
		c.SetDeadline(time.Now().Add(time.Minute))
	}
	return c, err
}

func (m *machine) mustDial(network string, to netip.AddrPort) net.Conn {
	m.t.Helper()
	c, err := m.dial(network, to)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { c.Close() })
	return c
}

// listen listens in the machine, or, if that is nil, on the host.
func (m *machine) listen(t testing.TB, at netip.AddrPort, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	var l net.Listener
	do := func() (err error) {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), "tcp", at.String())
		return err
	}
	var err error
	if m == nil {
		err = do()
	} else {
		err = m.ns.Do(do)
	}
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ended, end := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ended, func() { c.SetDeadline(time.Unix(1, 0)) })()
				c.SetDeadline(time.Now().Add(time.Minute))
				serve(c)
			})
		}
	})
	t.Cleanup(func() { l.Close(); end(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// echo sends back what comes. (io.Copy would splice, and leave pipes that look like leaked descriptors.)
func echo(c net.Conn) {
	io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
}

// exchange sends a text and wants it back.
func exchange(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("got %q, %v, want %q", b, err, text)
	}
}
