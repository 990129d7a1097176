package portmap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/splice"
)

func TestOutboxArranges(t *testing.T) {
	type bursts = [][3]int // segment, segments, size
	for _, tt := range []struct {
		name   string
		pieces [][2]int // size, segment
		single bool
		want   bursts
	}{
		{"alone", [][2]int{{100, 100}}, false, bursts{{100, 1, 100}}},
		{"equals", [][2]int{{100, 100}, {100, 100}, {100, 100}}, false, bursts{{100, 3, 300}}},
		{"a shorter one ends it", [][2]int{{100, 100}, {40, 40}, {100, 100}, {100, 100}}, false, bursts{{100, 2, 140}, {100, 2, 200}}},
		{"a longer one begins", [][2]int{{100, 100}, {101, 101}}, false, bursts{{100, 1, 100}, {101, 1, 101}}},
		{"empty ones", [][2]int{{0, 0}, {0, 0}, {7, 7}, {0, 0}}, false, bursts{{0, 1, 0}, {0, 1, 0}, {7, 1, 7}, {0, 1, 0}}},
		{"bursts join", [][2]int{{300, 100}, {250, 100}, {100, 100}}, false, bursts{{100, 6, 550}, {100, 1, 100}}},
		{"a burst of shorter ones", [][2]int{{100, 100}, {80, 40}}, false, bursts{{100, 1, 100}, {40, 2, 80}}},
		{"segments", [][2]int{{6000, 100}, {400, 100}, {100, 100}}, false, bursts{{100, 64, 6400}, {100, 1, 100}}},
		{"bytes", [][2]int{{60000, 1000}, {5000, 1000}, {1000, 1000}}, false, bursts{{1000, 65 - 5, 60000}, {1000, 6, 6000}}},
		{"single", [][2]int{{250, 100}, {100, 100}}, true, bursts{{100, 1, 100}, {100, 1, 100}, {50, 1, 50}, {100, 1, 100}}},
	} {
		var o outbox
		o.open(&route{single: tt.single})
		for _, p := range tt.pieces {
			o.add(make([]byte, p[0]), p[1])
		}
		var got bursts
		for _, u := range o.bursts[:o.arrange()] {
			got = append(got, [3]int{u.segment, u.segments, u.size})
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: bursts\n got %v\nwant %v", tt.name, got, tt.want)
		}
	}
}

// numbered is n datagrams of the given size, each with its number in front.
func numbered(n, size int) (data []byte) {
	for i := range n {
		data = append(binary.BigEndian.AppendUint32(data, uint32(i)), bytes.Repeat([]byte{byte(i)}, size-4)...)
	}
	return data
}

// descriptor is c's, for as long as c is open.
func descriptor(t testing.TB, c *net.UDPConn) (fd int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(n uintptr) { fd = int(n) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// sendBurst sends data as datagrams of the given size, which the kernel has as one until somebody asks for a single one.
func sendBurst(t testing.TB, c *net.UDPConn, data []byte, size int) {
	t.Helper()
	r := &route{fd: descriptor(t, c)}
	var out outbox
	out.open(r)
	out.add(data, size)
	out.flush()
	if r.single {
		t.Fatal("the kernel did not take a burst")
	}
}

// mustGet reads the datagrams of data one by one.
func mustGet(t testing.TB, c *net.UDPConn, data []byte, size int) {
	t.Helper()
	b := make([]byte, maxMessage)
	for i := 0; len(data) > 0; i++ {
		want := data[:min(size, len(data))]
		data = data[len(want):]
		n, err := c.Read(b)
		for err == nil && string(b[:n]) == greeting { // one that came late
			n, err = c.Read(b)
		}
		if err != nil || !bytes.Equal(b[:n], want) {
			t.Fatalf("datagram %d: %d bytes that begin %x (%v), want %d that begin %x", i, n, b[:min(n, 4)], err, len(want), want[:4])
		}
	}
}

// What is sent in bursts arrives as the datagrams that it is, in order, both ways: over ways that take bursts, and over
// ways that are too narrow for the datagrams, where the kernel refuses to cut a burst into fragments.
func TestUDPBursts(t *testing.T) {
	here, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	within, outside := nettest.NewNS(t), nettest.NewNS(t)
	nettest.Veth(t, "host1", netip.MustParsePrefix("10.200.2.1/24"), within, "server0", netip.MustParsePrefix("10.200.2.2/24"))
	nettest.Veth(t, "host0", netip.MustParsePrefix("10.200.1.1/24"), outside, "client0", netip.MustParsePrefix("10.200.1.9/24"))
	for _, tt := range []struct {
		name           string
		client, server bool // is behind a veth pair of MTU 1500, and not at the loopback
		n, size, short int  // datagrams, their bytes, and those of one more
	}{
		{"wide", false, false, 40, 1200, 5},
		{"wide, many small ones", false, false, 63, 20, 0},
		{"narrow to the server", false, true, 30, 2000, 7},
		{"narrow to the client", true, false, 30, 2000, 7},
		{"through veth", true, true, 40, 1200, 900},
	} {
		t.Run(tt.name, func(t *testing.T) {
			target, host := container, "127.0.0.1"
			listen := func() (*net.UDPConn, error) {
				return net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(target, 0)))
			}
			up, down := tt.size, tt.size // nobody sends longer datagrams than its own device takes
			serverNS, clientNS := here, here
			if tt.server {
				serverNS, target, down = within, netip.MustParseAddr("10.200.2.2"), min(down, 1400)
			}
			if tt.client {
				clientNS, host, up = outside, "10.200.1.1", min(up, 1400)
			}
			server := in(t, serverNS, listen)
			defer server.Close()
			f, err := newMapper(t).Publish(Request{Port: udpPort(addrPort(server.LocalAddr()).Port()), Addr4: target, Dialer: Host{}})
			if err != nil {
				t.Fatal(err)
			}
			defer closeSoon(t, f)
			client := in(t, clientNS, func() (*net.UDPConn, error) {
				return net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(at(f, host)))
			})
			defer client.Close()
			flow := hello(t, client, server)
			mustPass(t, client, server, tt.n, up, tt.short)
			if err := unix.Connect(descriptor(t, server), splice.Sockaddr(flow)); err != nil {
				t.Fatal(err)
			}
			mustPass(t, server, client, tt.n, down, tt.short)
		})
	}
}

// mustPass sends three bursts of n datagrams and a shorter one, and wants them at the other end.
func mustPass(t testing.TB, from, to *net.UDPConn, n, size, short int) {
	t.Helper()
	to.SetReadDeadline(time.Now().Add(patience))
	data := append(numbered(n, size), make([]byte, short)...)
	for range 3 {
		sendBurst(t, from, data, size)
		mustGet(t, to, data, size)
	}
}

const greeting = "hello"

// hello sends a datagram until one arrives, and returns what the server sees as the client. A new veth pair may lose some.
func hello(t testing.TB, client, server *net.UDPConn) (flow netip.AddrPort) {
	t.Helper()
	b := make([]byte, 100)
	eventually(t, "hello", func() bool {
		client.Write([]byte(greeting))
		server.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		var err error
		_, flow, err = server.ReadFromUDPAddrPort(b)
		return err == nil
	})
	return flow
}

func TestUDPThousandFlows(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), Host{})
	const clients = 1000
	conns := make([]*net.UDPConn, clients)
	for i := range conns {
		conns[i] = udpClient(t, at(f, []string{"127.0.0.1", "127.0.0.2", "::1"}[i%3]))
	}
	for round := range 3 {
		var wg sync.WaitGroup
		for part := range 10 {
			wg.Go(func() {
				got := make([]byte, 100)
				for i := part; i < clients; i += 10 {
					text := fmt.Sprintf("client %d round %d", i, round)
					conns[i].Write([]byte(text))
					if n, err := conns[i].Read(got); err != nil || string(got[:n]) != text {
						t.Errorf("got %q (%v), want %q", got[:n], err, text)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	if got, want := f.Stats(), (Stats{Accepted: clients, Active: clients}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if got, want := f.Stats(), (Stats{Accepted: clients}); got != want {
		t.Errorf("after Close: stats %+v, want %+v", got, want)
	}
}

// clogged is a Dialer whose first flow leads to somebody who never reads, and whose socket is full soon.
type clogged struct {
	Host
	once *sync.Once
	peer *int
}

func (d clogged) DialUDP(client, target netip.AddrPort) (fd int, err error) {
	first := false
	d.once.Do(func() { first = true })
	if !first {
		return d.Host.DialUDP(client, target)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	*d.peer = pair[1]
	return pair[0], err
}

func TestUDPSlowContainerStallsNobody(t *testing.T) {
	m := newMapper(t)
	d := clogged{once: new(sync.Once), peer: new(int)}
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), d)
	slow, quick := udpClient(t, at(f, "127.0.0.1")), udpClient(t, at(f, "127.0.0.1"))
	slow.Write([]byte("mine"))
	eventually(t, "flow", func() bool { return f.Stats().Active == 1 })
	defer unix.Close(*d.peer)
	const sent = 500
	for range sent {
		slow.Write(make([]byte, 1000))
	}
	udpExchange(t, quick, []byte("hello"))
	arrived := 0
	for b := make([]byte, 2000); ; arrived++ {
		if _, err := unix.Read(*d.peer, b); err != nil {
			break
		}
	}
	if arrived == 0 || arrived >= sent {
		t.Errorf("%d of %d datagrams arrived: the flow was not full", arrived, sent)
	}
}

// A socket that cannot be read is left alone for a while, with one warning, and is read again then. Here it is connected,
// and learns from ICMP that nobody is there.
func TestUDPListenerRests(t *testing.T) {
	m := newMapper(t)
	h := told{slog.DiscardHandler, make(chan string, 10)}
	echo := netip.AddrPortFrom(container, udpEcho(t, container))
	fd, port, err := listenUDP(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	probe := udpServer(t, netip.MustParseAddr("127.0.0.1"), 0)
	absent := addrPort(probe.LocalAddr())
	probe.Close()
	if err := unix.Connect(fd, splice.Sockaddr(absent)); err != nil {
		t.Fatal(err)
	}
	unix.Write(fd, []byte("anyone?")) // loopback: the answer is there when this returns

	r := &server{dialer: Host{}, limits: m.limits, log: slog.New(h), counters: new(counters), batches: &m.batches}
	var g splice.Group
	defer g.Close()
	r.serveUDP(&g, []*udpListener{{fd: fd, target: echo}})
	select {
	case <-h.messages:
	case <-time.After(patience):
		t.Fatal("no warning")
	}
	c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(absent), net.UDPAddrFromAddrPort(netip.AddrPortFrom(absent.Addr(), port)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	udpExchange(t, c, []byte("hello"))
	if n := len(h.messages); n != 0 {
		t.Errorf("%d more warnings, want one", n)
	}
}
