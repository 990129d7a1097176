package vmnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/usermode/l2"
)

// caller answers with who calls.
func caller(c net.Conn) {
	fmt.Fprintln(c, c.RemoteAddr())
	echo(c)
}

// TestDialTCP: the machine sees the client where it can, and the gateway where not.
func TestDialTCP(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	v4, v6 := netip.AddrPortFrom(m.addr, 80), netip.AddrPortFrom(m.addr6(), 80)
	m.listen(t, v4, caller)
	m.listen(t, v6, caller)
	ap := netip.MustParseAddrPort
	for _, c := range []struct {
		client, to netip.AddrPort
		want       string // the address; with a port, if that is the client's
	}{
		{netip.AddrPort{}, v4, "192.168.127.1"},
		{ap("127.0.0.1:4000"), v4, "192.168.127.1"},
		{ap("[::1]:4000"), v6, "fd75:6e65:74:7f::1"},
		{ap("192.168.127.9:4000"), v4, "192.168.127.1"},
		{ap("[2001:db8::7]:4000"), v4, "192.168.127.1"},
		{ap("192.0.2.7:4000"), v6, "fd75:6e65:74:7f::1"},
		{ap("169.254.1.1:4000"), v4, "192.168.127.1"},
		{ap("192.0.2.7:4000"), v4, "192.0.2.7:4000"},
		{ap("192.0.2.7:4000"), v4, "192.0.2.7"}, // the port is in use
		{ap("192.0.2.7:4001"), netip.AddrPortFrom(netip.AddrFrom16(v4.Addr().As16()), 80), "192.0.2.7:4001"},
		{ap("[::ffff:192.0.2.8]:4000"), v4, "192.0.2.8:4000"},
		{ap("[2001:db8::7]:4000"), v6, "[2001:db8::7]:4000"},
	} {
		conn, err := b.DialTCP(t.Context(), c.client, c.to)
		if err != nil {
			t.Errorf("%s: %v", c.client, err)
			continue
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Minute))
		var got string
		if _, err := fmt.Fscan(conn, &got); err != nil {
			t.Errorf("%s: %v", c.client, err)
		}
		if addr := ap(got).Addr().String(); got != c.want && addr != c.want {
			t.Errorf("for client %s the machine sees %s, want %s", c.client, got, c.want)
		}
		exchange(t, conn, "hello")
	}
	if _, err := b.DialTCP(t.Context(), netip.AddrPort{}, netip.AddrPortFrom(m.addr, 81)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	for _, to := range []string{"192.168.127.1:80", "192.168.127.255:80", "10.200.9.1:80", "127.0.0.1:80", "192.168.127.254:80"} {
		if _, err := b.DialTCP(t.Context(), netip.AddrPort{}, ap(to)); !errors.Is(err, errNotInside) {
			t.Errorf("dial %s: %v", to, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := b.DialTCP(ctx, netip.AddrPort{}, ap("192.168.127.77:80")); err == nil {
		t.Error("connected to nobody")
	}
}

// TestAsksAsGateway: who a client is, does not become a neighbour of the machine's, which would look for it on the link from then on.
func TestAsksAsGateway(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	to := netip.AddrPortFrom(m.addr6(), 81)
	for _, client := range []string{"[2001:db8::7]:4000", "[2001:db8::8]:4000"} {
		if _, err := b.DialTCP(t.Context(), netip.MustParseAddrPort(client), to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
	}
	var neighbours []netlink.Neigh
	err := m.ns.Do(func() (err error) {
		neighbours, err = netlink.NeighList(0, netlink.FAMILY_V6)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range neighbours {
		if strings.HasPrefix(n.IP.String(), "2001:db8:") {
			t.Errorf("%s is a neighbour", n.IP)
		}
	}
	if len(neighbours) == 0 {
		t.Error("the machine knows nobody")
	}
}

// pair is a pair of connected sockets of the host.
func pair(t *testing.T, network, address string) (near, far net.Conn) {
	t.Helper()
	near, far = uncleanedPair(t, network, address)
	t.Cleanup(func() { far.Close() })
	return near, far
}

// uncleanedPair leaves it to the caller to close far.
func uncleanedPair(t *testing.T, network, address string) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if far, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	far.SetDeadline(time.Now().Add(time.Minute))
	if near, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return near, far
}

// TestJoinTCP: a forward's connection and the machine's, with the client's address; refused ones are reset.
func TestJoinTCP(t *testing.T) {
	eachFraming(t, func(t *testing.T, framing l2.Framing) {
		b := newBed(t, testConfig(t))
		m := b.machine(2, framing)
		to := m.listen(t, netip.AddrPortFrom(m.addr, 0), echo)
		client := netip.MustParseAddrPort("192.0.2.7:4000")
		for _, network := range []string{"tcp", "unix"} {
			address := "127.0.0.1:0"
			if network == "unix" {
				address = filepath.Join(t.TempDir(), "s")
			}
			near, far := pair(t, network, address)
			joined := make(chan error, 1)
			go func() { joined <- b.JoinTCP(t.Context(), near, client, to) }()
			echoed(t, far, 8<<20)
			if err := <-joined; err != nil {
				t.Errorf("%s: %v", network, err)
			}
		}
		near, far := pair(t, "tcp", "127.0.0.1:0")
		if err := b.JoinTCP(t.Context(), near, client, netip.AddrPortFrom(m.addr, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client gets %v, want a reset", err)
		}
		near, far = pair(t, "tcp", "127.0.0.1:0")
		ctx, cancel := context.WithCancel(t.Context())
		joined := make(chan error, 1)
		go func() { joined <- b.JoinTCP(ctx, near, client, to) }()
		exchange(t, far, "until ctx is done")
		cancel()
		if err := <-joined; err != nil {
			t.Errorf("ended by its context: %v", err)
		}
		if n := b.Stats().Inbound; n != 0 {
			t.Errorf("%d connections inwards are left", n)
		}
	})
}

// TestDialUDP: the machine sees the client; each datagram is one; who does not listen says so.
func TestDialUDP(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	var u *net.UDPConn
	if err := m.ns.Do(func() (err error) {
		u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(m.addr, 0)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			u.WriteToUDPAddrPort(append([]byte(from.String()+" "), buf[:n]...), from)
		}
	})
	t.Cleanup(func() { u.Close(); wg.Wait() })
	to := u.LocalAddr().(*net.UDPAddr).AddrPort()
	client := netip.MustParseAddrPort("192.0.2.7:4000")
	for _, want := range []string{"192.0.2.7:4000 hello", ""} {
		c, err := b.DialUDP(client, to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(c, "hello")
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(buf[:n]); want != "" && got != want || want == "" && got == "192.0.2.7:4000 hello" {
			t.Errorf("the answer is %q", got)
		}
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := c.(io.WriterTo).WriteTo(io.Discard); !isTimeout(err) {
			t.Errorf("nothing comes: %v", err)
		}
	}
	c, err := b.DialUDP(client, netip.AddrPortFrom(m.addr, 1))
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, "hello")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}
	c.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	if n := b.sockets.connections.Load(); n != 2 {
		t.Errorf("%d sockets, want 2", n)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// TestRunEnds: everything that is open at the end of Run is gone when it returns, and its users learn of it.
func TestRunEnds(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	service := m.listen(t, netip.AddrPortFrom(m.addr, 0), echo)
	to := (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), echo)
	out := m.mustDial("tcp", to)
	exchange(t, out, "out")
	dialled, err := b.DialTCP(t.Context(), netip.AddrPort{}, service)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := b.ListenTCP(80)
	if err != nil {
		t.Fatal(err)
	}
	packets, err := b.ListenUDP(53)
	if err != nil {
		t.Fatal(err)
	}
	near, far := pair(t, "tcp", "127.0.0.1:0")
	var wg sync.WaitGroup
	wg.Go(func() { b.JoinTCP(context.Background(), near, netip.AddrPort{}, service) })
	exchange(t, far, "in")
	errs := make(chan error, 4)
	read := func(c io.Reader) { wg.Go(func() { _, err := c.Read(make([]byte, 1)); errs <- err }) }
	read(dialled)
	read(far)
	wg.Go(func() { _, err := listener.Accept(); errs <- err })
	wg.Go(func() { _, _, err := packets.ReadFrom(make([]byte, 1)); errs <- err })
	time.Sleep(10 * time.Millisecond) // they had better be waiting
	start := time.Now()
	b.stop()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("Run took %v to end", d)
	}
	wg.Wait()
	for range 4 {
		if err := <-errs; err == nil {
			t.Error("a read or Accept succeeded")
		}
	}
	for name, f := range map[string]func() error{
		"DialTCP":   func() error { _, err := b.DialTCP(t.Context(), netip.AddrPort{}, service); return err },
		"DialUDP":   func() error { _, err := b.DialUDP(netip.AddrPort{}, service); return err },
		"ListenTCP": func() error { _, err := b.ListenTCP(81); return err },
		"ListenUDP": func() error { _, err := b.ListenUDP(81); return err },
		"JoinTCP": func() error {
			near, _ := pair(t, "tcp", "127.0.0.1:0")
			return b.JoinTCP(t.Context(), near, netip.AddrPort{}, service)
		},
	} {
		if err := f(); err == nil {
			t.Errorf("%s after the end succeeded", name)
		}
	}
}

// TestStuckMachine: one that reads nothing holds up nobody, and costs a bounded amount.
func TestStuckMachine(t *testing.T) {
	b := newBed(t, testConfig(t))
	good := b.machine(2, l2.Usernet)
	b.room = 64 << 10
	stuck := b.machine(3, l2.HyperKit)
	to := (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), echo)
	stuck.hang(b, (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), pour))
	echoed(t, good.mustDial("tcp", to), 32<<20)
	start := time.Now()
	for range 50 { // each of which has a deadline
		c := good.mustDial("tcp", to)
		exchange(t, c, "hello")
		c.Close()
	}
	t.Logf("50 connections of another machine took %v", time.Since(start))
	for _, box := range *b.link.outboxes.Load() {
		box.mu.Lock()
		if box.bytes > outboxSize {
			t.Errorf("%d bytes in the outbox", box.bytes)
		}
		box.mu.Unlock()
	}
	stuck.resume()
	exchange(t, stuck.mustDial("tcp", to), "back again")
}
