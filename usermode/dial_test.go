package usermode

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/splice"
)

var (
	client4 = netip.MustParseAddrPort("192.0.2.7:40007")
	client6 = netip.MustParseAddrPort("[2001:db8::7]:40007")
)

// families are the same test twice.
var families = []struct {
	name, udp, tcp             string
	client, container, gateway netip.AddrPort
}{
	{"IPv4", "udp4", "tcp4", client4, netip.AddrPortFrom(container4.Addr(), 80), netip.AddrPortFrom(gateway4.Addr(), 0)},
	{"IPv6", "udp6", "tcp6", client6, netip.AddrPortFrom(container6.Addr(), 80), netip.AddrPortFrom(gateway6.Addr(), 0)},
}

// openWithContainer is a fabric with one container on its bridge.
func openWithContainer(t *testing.T) (*Gateway, *netns.NS) {
	t.Helper()
	g := openFabric(t, testConfig(t.TempDir()))
	if ok, err := g.Transparent(); !ok {
		t.Fatalf("not transparent: %v", err)
	}
	addBridge(t, g)
	return g, addContainer(t, g, "c1", container4, container6)
}

// dialTCP dials as portmap does, and waits.
func dialTCP(g *Gateway, client, target netip.AddrPort) (*net.TCPConn, error) {
	fd, err := g.StartTCP(client, target)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), target.String())
	defer f.Close()
	if err := connected(fd, 5*time.Second); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// dialUDP dials as portmap does.
func dialUDP(g *Gateway, client, target netip.AddrPort) (*net.UDPConn, error) {
	fd, err := g.DialUDP(client, target)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), target.String())
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// connected waits for the outcome of a connect.
func connected(fd int, limit time.Duration) error {
	var group splice.Group
	defer group.Close()
	result := make(chan error, 1)
	group.Connect(fd, limit, func(err error) { result <- err })
	return <-result
}

// listen listens in ns until the test ends.
func listen(t *testing.T, ns *netns.NS, network string, at netip.AddrPort) *net.TCPListener {
	t.Helper()
	l := inside(t, ns, func() (net.Listener, error) { return net.Listen(network, at.String()) })
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// peerOf accepts a connection, checks that c carries bytes both ways to it, closes the container's end first or last, and
// returns the address that the container saw.
func peerOf(t *testing.T, l *net.TCPListener, c *net.TCPConn, closeFirst bool) netip.AddrPort {
	t.Helper()
	l.SetDeadline(time.Now().Add(5 * time.Second))
	s, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	s.SetDeadline(time.Now().Add(5 * time.Second))
	for _, way := range [][2]net.Conn{{c, s}, {s, c}} {
		if _, err := io.WriteString(way[0], "hello"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(way[1], b); err != nil || string(b) != "hello" {
			t.Fatalf("received %q, %v", b, err)
		}
	}
	first, second := c, s
	if closeFirst {
		first, second = s, c
	}
	first.Close()
	if _, err := second.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the other end closed: %v, want EOF", err)
	}
	second.Close()
	return s.RemoteAddr().(*net.TCPAddr).AddrPort()
}

func TestDialTCPShowsTheClient(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			g, ns := openWithContainer(t)
			l := listen(t, ns, f.tcp, f.container)
			c, err := dialTCP(g, f.client, f.container)
			if err != nil {
				t.Fatal(err)
			}
			if got := peerOf(t, l, c, false); got != f.client {
				t.Errorf("the container saw %s, want %s", got, f.client)
			}
		})
	}
}

// A client that reconnects from the same port meets the old connection in TIME_WAIT, in the fabric or in the container.
func TestFastReconnect(t *testing.T) {
	for _, f := range families {
		for _, containerFirst := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/container first %v", f.name, containerFirst), func(t *testing.T) {
				g, ns := openWithContainer(t)
				l := listen(t, ns, f.tcp, f.container)
				for i := range 5 {
					c, err := dialTCP(g, f.client, f.container)
					if err != nil {
						t.Fatalf("connection %d: %v", i, err)
					}
					if got := peerOf(t, l, c, containerFirst); got.Addr() != f.client.Addr() {
						t.Errorf("connection %d: the container saw %s, want %s", i, got, f.client)
					}
				}
			})
		}
	}
}

// One client port, three connections at once: two containers see it, and the second connection to the first sees the
// client with another port.
func TestOneClientPortSeveralConnections(t *testing.T) {
	g, one := openWithContainer(t)
	other := netip.MustParsePrefix("10.200.1.3/24")
	two := addContainer(t, g, "c2", other)
	target1, target2 := families[0].container, netip.AddrPortFrom(other.Addr(), 80)
	l1, l2 := listen(t, one, "tcp4", target1), listen(t, two, "tcp4", target2)
	var conns []*net.TCPConn
	for _, target := range []netip.AddrPort{target1, target2, target1} {
		c, err := dialTCP(g, client4, target)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	if got := peerOf(t, l1, conns[0], true); got != client4 {
		t.Errorf("first: %s, want %s", got, client4)
	}
	if got := peerOf(t, l2, conns[1], true); got != client4 {
		t.Errorf("other container: %s, want %s", got, client4)
	}
	if got := peerOf(t, l1, conns[2], true); got.Addr() != client4.Addr() || got.Port() == client4.Port() {
		t.Errorf("same container again: %s, want the address of %s and another port", got, client4)
	}
}

func TestDialFromAnAddressThatCannotStand(t *testing.T) {
	g, ns := openWithContainer(t)
	for _, f := range families {
		for _, client := range []string{"127.0.0.1:5000", "[::1]:5000", "10.200.1.9:5000", "[fd00:200:1::9]:5000", "0.0.0.0:0"} {
			l := listen(t, ns, f.tcp, f.container)
			c, err := dialTCP(g, netip.MustParseAddrPort(client), f.container)
			if err != nil {
				t.Fatalf("%s from %s: %v", f.name, client, err)
			}
			if got := peerOf(t, l, c, true); got.Addr() != f.gateway.Addr() {
				t.Errorf("%s from %s: the container saw %s, want the gateway", f.name, client, got)
			}
			l.Close()
		}
	}
}

func TestSources(t *testing.T) {
	g := &Gateway{fabric: &fabric{cfg: testConfig("")}}
	none := usernet.Subnet{Prefix: gateway4.Masked()}
	v4, v6 := g.cfg.Subnets[0], g.cfg.Subnets[1]
	for _, tc := range []struct {
		client string
		subnet usernet.Subnet
		opaque error
		want   string
	}{
		{"192.0.2.7:5000", v4, nil, "192.0.2.7:5000 192.0.2.7:0 10.200.1.1:0"},
		{"192.0.2.7:0", v4, nil, "192.0.2.7:0 192.0.2.7:0 10.200.1.1:0"},
		{"[::ffff:192.0.2.7]:5000", v4, nil, "192.0.2.7:5000 192.0.2.7:0 10.200.1.1:0"},
		{"[2001:db8::7]:5000", v6, nil, "[2001:db8::7]:5000 [2001:db8::7]:0 [fd00:200:1::1]:0"},
		{"192.0.2.7:5000", none, nil, "192.0.2.7:5000 192.0.2.7:0 invalid AddrPort"},
		{"192.0.2.7:5000", v4, errors.New("no nftables"), "10.200.1.1:0"},
		{"192.0.2.7:5000", v6, nil, "[fd00:200:1::1]:0"},
		{"[2001:db8::7]:5000", v4, nil, "10.200.1.1:0"},
		{"127.0.0.1:5000", v4, nil, "10.200.1.1:0"},
		{"[::ffff:127.0.0.1]:5000", v4, nil, "10.200.1.1:0"},
		{"0.0.0.0:5000", v4, nil, "10.200.1.1:0"},
		{"169.254.1.1:5000", v4, nil, "10.200.1.1:0"},
		{"224.0.0.1:5000", v4, nil, "10.200.1.1:0"},
		{"10.200.1.1:5000", v4, nil, "10.200.1.1:0"},
		{"10.200.1.200:5000", v4, nil, "10.200.1.1:0"},
		{"127.0.0.1:5000", none, nil, "invalid AddrPort"},
		{"[::1]:5000", v6, nil, "[fd00:200:1::1]:0"},
		{"[::]:5000", v6, nil, "[fd00:200:1::1]:0"},
		{"[fe80::1%eth0]:5000", v6, nil, "[fd00:200:1::1]:0"},
		{"[ff02::1]:5000", v6, nil, "[fd00:200:1::1]:0"},
		{"[fd00:200:1::99]:5000", v6, nil, "[fd00:200:1::1]:0"},
		{"", v4, nil, "10.200.1.1:0"},
	} {
		var client netip.AddrPort
		if tc.client != "" {
			client = netip.MustParseAddrPort(tc.client)
		}
		g.divertErr = tc.opaque
		var got []string
		for i, s := range g.sources(client, tc.subnet) {
			got = append(got, s.addr.String())
			if own := !s.addr.IsValid() || s.addr.Addr() == tc.subnet.Gateway; own == s.foreign {
				t.Errorf("client %s: source %d, %s: foreign is %v", tc.client, i, s.addr, s.foreign)
			}
		}
		if diff := cmp.Diff(tc.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("client %s, subnet %s (-want +got):\n%s", tc.client, tc.subnet.Prefix, diff)
		}
	}
}

func TestDialUDP(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			g, ns := openWithContainer(t)
			server := inside(t, ns, func() (net.PacketConn, error) { return net.ListenPacket(f.udp, f.container.String()) })
			defer server.Close()
			server.SetDeadline(time.Now().Add(5 * time.Second))
			// The same client port once more: the first flow keeps it.
			for i, port := range []bool{true, false} {
				c, err := dialUDP(g, f.client, f.container)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(5 * time.Second))
				from := roundTrip(t, c, server, fmt.Sprint("flow ", i))
				if from.Addr() != f.client.Addr() || (from.Port() == f.client.Port()) != port {
					t.Errorf("flow %d: the container saw %s, want %s, with its port: %v", i, from, f.client, port)
				}
			}
			c, err := dialUDP(g, netip.MustParseAddrPort("127.0.0.1:5000"), f.container)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			if from := roundTrip(t, c, server, "from here"); from.Addr() != f.gateway.Addr() {
				t.Errorf("from loopback: the container saw %s, want %s", from, f.gateway)
			}
		})
	}
}

// roundTrip sends a datagram over c and its answer back, and returns the address that server saw.
func roundTrip(t *testing.T, c *net.UDPConn, server net.PacketConn, text string) netip.AddrPort {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, from, err := server.ReadFrom(b)
	if err != nil || string(b[:n]) != text {
		t.Fatalf("the container received %q, %v, want %q", b[:n], err, text)
	}
	if _, err := server.WriteTo([]byte("re: "+text), from); err != nil {
		t.Fatal(err)
	}
	n, err = c.Read(b)
	if err != nil || string(b[:n]) != "re: "+text {
		t.Fatalf("the answer is %q, %v, want re: %s", b[:n], err, text)
	}
	return from.(*net.UDPAddr).AddrPort()
}

// Another container knows the client's address and port, and answers in the place of the one that was asked.
func TestDialUDPTakesNoAnswerFromOthers(t *testing.T) {
	g, one := openWithContainer(t)
	two := addContainer(t, g, "c2", netip.MustParsePrefix("10.200.1.3/24"))
	target := families[0].container
	server := inside(t, one, func() (net.PacketConn, error) { return net.ListenPacket("udp4", target.String()) })
	defer server.Close()
	intruder := inside(t, two, func() (net.PacketConn, error) { return net.ListenPacket("udp4", "10.200.1.3:80") })
	defer intruder.Close()
	c, err := dialUDP(g, client4, target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, conn := range []interface{ SetDeadline(time.Time) error }{server, intruder, c} {
		conn.SetDeadline(time.Now().Add(5 * time.Second))
	}
	if _, err := intruder.WriteTo([]byte("intruder"), net.UDPAddrFromAddrPort(client4)); err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, server, "hello") // would read the intruder's first
}

func TestDialRefused(t *testing.T) {
	g, _ := openWithContainer(t)
	for _, f := range families {
		if c, err := dialTCP(g, f.client, f.container); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: DialTCP: %v, %v, want refused", f.name, c, err)
		}
		c, err := dialUDP(g, f.client, f.container)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write([]byte("anybody?")); err != nil {
			t.Errorf("%s: write: %v", f.name, err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: read from a closed port: %v, want refused", f.name, err)
		}
	}
}

func TestDialOutsideOfTheNetwork(t *testing.T) {
	g := openFabric(t, testConfig(t.TempDir()))
	for _, target := range []string{"192.0.2.1:80", "127.0.0.1:80", "[2001:db8::1]:80", "[::ffff:127.0.0.1]:80"} {
		target := netip.MustParseAddrPort(target)
		if _, err := dialTCP(g, client4, target); !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("DialTCP to %s: %v, want invalid", target, err)
		}
		if _, err := g.DialUDP(client4, target); !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("DialUDP to %s: %v, want invalid", target, err)
		}
	}
}

// Two hundred clients of a container that does not answer must cost no threads.
func TestPendingDialsHoldNoThreads(t *testing.T) {
	g, _ := openWithContainer(t)
	hole := netip.MustParseAddrPort("10.200.1.99:80")
	nettest.Handle(t, g.Netns(), func(h *netlink.Handle) error {
		bridge, err := h.LinkByName("br0")
		if err != nil {
			return err
		}
		return h.NeighAdd(&netlink.Neigh{
			LinkIndex: bridge.Attrs().Index, State: netlink.NUD_PERMANENT,
			IP: hole.Addr().AsSlice(), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 99},
		})
	})
	const dials = 200
	before := threads(t)
	for i := range dials {
		fd, err := g.StartTCP(netip.AddrPortFrom(client4.Addr(), uint16(20000+i)), hole)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
	}
	if n := pending(t, g.Netns(), hole); n != dials {
		t.Errorf("%d of %d dials are pending", n, dials)
	}
	if after := threads(t); after > before+20 {
		t.Errorf("%d threads with %d dials pending, %d before", after, dials, before)
	}
}

// pending counts the connections to target in ns that wait for an answer.
func pending(t *testing.T, ns *netns.NS, target netip.AddrPort) int {
	t.Helper()
	socks := inside(t, ns, func() ([]*netlink.Socket, error) { return netlink.SocketDiagTCP(unix.AF_INET) })
	n := 0
	for _, s := range socks {
		const synSent = 2
		if s.State == synSent && s.ID.DestinationPort == target.Port() && s.ID.Destination.Equal(target.Addr().AsSlice()) {
			n++
		}
	}
	return n
}

func threads(t *testing.T) int {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	return len(tasks)
}
