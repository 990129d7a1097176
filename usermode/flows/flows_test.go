//go:build linux

package flows

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var (
	guest4, guest6 = netip.MustParseAddr("192.168.127.2"), netip.MustParseAddr("fd75:6e65:74:7f::2")
	alias4, alias6 = netip.MustParseAddr("192.168.127.254"), netip.MustParseAddr("fd75:6e65:74:7f::fe")
	local4, local6 = netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	// What no guest may reach.
	forbidden4, forbidden6 = netip.MustParseAddr("10.200.66.6"), netip.MustParseAddr("fd00:200:66::6")
)

const patience = 10 * time.Second // for what comes as soon as the machine has time

// resolve is what the tests' host maps.
func resolve(a netip.Addr) (netip.Addr, bool) {
	switch a {
	case alias4:
		return local4, true
	case alias6:
		return local6, true
	}
	return a, a != forbidden4 && a != forbidden6
}

// network is Flows, and the guests that they send to.
type network struct {
	*Flows
	datagrams chan arrived
	messages  chan arrived
	stop      func()
}

type arrived struct {
	from, to netip.AddrPort
	payload  []byte
}

// start runs Flows until the test ends; set may change them before.
func start(t testing.TB, set func(*Flows)) *network {
	t.Helper()
	nettest.NoLeaks(t)
	n := &network{datagrams: make(chan arrived, 1000), messages: make(chan arrived, 1000)}
	n.Flows = New(Config{
		Resolve: resolve,
		SendUDP: func(from, to netip.AddrPort, payloads [][]byte) {
			for _, p := range payloads {
				n.datagrams <- arrived{from, to, slices.Clone(p)}
			}
		},
		SendICMP: func(from, to netip.Addr, message []byte) {
			n.messages <- arrived{netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, 0), slices.Clone(message)}
		},
		Log: slog.New(slog.DiscardHandler),
	})
	if set != nil {
		set(n.Flows)
	}
	n.stop = run(t, n.Flows)
	return n
}

// run runs f until the test ends or stop is called, and checks that nothing of it is left then.
func run(t testing.TB, f *Flows) (stop func()) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if s := f.Stats(); s.Flows != 0 || s.Echoes != 0 {
			t.Errorf("after Run there are %d flows and %d echoes", s.Flows, s.Echoes)
		}
		goleak.VerifyNone(t, before)
	})
	t.Cleanup(stop)
	await(t, f.isRunning)
	await(t, func() bool { f.udp.mu.Lock(); defer f.udp.mu.Unlock(); return f.udp.open })
	return stop
}

// await waits for something that nobody tells of.
func await(t testing.TB, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited for nothing")
		}
	}
}

// send sends datagrams of a guest, which have DF.
func (n *network) send(client, dst netip.AddrPort, hops uint8, payloads ...[]byte) {
	var b [ipv6HdrLen + udpHdrLen]byte
	n.UDP(client, dst, hops, header(putUDP(b[:], client, dst, len(payloads[0]))), payloads)
}

// header gives an IPv4 packet DF.
func header(b []byte) []byte {
	if b[0]>>4 == 4 {
		b[6] |= 0x40
		b[10], b[11] = 0, 0
		binary.BigEndian.PutUint16(b[10:], ^sum(b[:ipv4HdrLen], 0))
	}
	return b
}

// next waits for what comes to a guest.
func next(t testing.TB, c <-chan arrived) arrived {
	t.Helper()
	select {
	case a := <-c:
		return a
	case <-time.After(patience):
		t.Fatal("nothing came")
		return arrived{}
	}
}

// wantError waits for an ICMP error, checks it and returns what it quotes behind the IP header.
func (n *network) wantError(t *testing.T, want icmperror.Message, from, client, dst netip.Addr) []byte {
	t.Helper()
	a := next(t, n.messages)
	m, v4 := a.payload, client.Is4()
	if a.from.Addr() != from || a.to.Addr() != client {
		t.Errorf("error from %s to %s, want from %s to %s", a.from.Addr(), a.to.Addr(), from, client)
	}
	if icmpSum(m, a.from.Addr(), a.to.Addr()) != 0xffff {
		t.Error("wrong checksum")
	}
	mtu := uint32(binary.BigEndian.Uint16(m[6:]))
	if !v4 {
		mtu = binary.BigEndian.Uint32(m[4:])
	}
	if m[0] != want.Type || m[1] != want.Code || mtu != want.MTU {
		t.Fatalf("type %d, code %d, MTU %d, want %d, %d, %d", m[0], m[1], mtu, want.Type, want.Code, want.MTU)
	}
	ip := m[icmpHdrLen:]
	if v4 {
		if src, to := netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:])); src != client || to != dst {
			t.Errorf("quotes a packet from %s to %s, want from %s to %s", src, to, client, dst)
		}
		if sum(ip[:ipv4HdrLen], 0) != 0xffff {
			t.Error("wrong checksum in the quoted header")
		}
		return ip[ipv4HdrLen:]
	}
	if src, to := netip.AddrFrom16([16]byte(ip[8:])), netip.AddrFrom16([16]byte(ip[24:])); src != client || to != dst {
		t.Errorf("quotes a packet from %s to %s, want from %s to %s", src, to, client, dst)
	}
	return ip[ipv6HdrLen:]
}

// wantUDPError is wantError for one about a datagram from client to dst.
func (n *network) wantUDPError(t *testing.T, want icmperror.Message, from netip.Addr, client, dst netip.AddrPort) {
	t.Helper()
	u := n.wantError(t, want, from, client.Addr(), dst.Addr())
	if src, to := binary.BigEndian.Uint16(u), binary.BigEndian.Uint16(u[2:]); src != client.Port() || to != dst.Port() {
		t.Errorf("quotes ports %d, %d, want %d, %d", src, to, client.Port(), dst.Port())
	}
}

// echoServer sends datagrams back, at addr and a port of its own.
func echoServer(t testing.TB, addr netip.Addr) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	c.SetReadBuffer(4 << 20)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return netip.AddrPortFrom(addr, c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
}

// deafPort is a port where nobody listens.
func deafPort(t testing.TB, addr netip.Addr) uint16 {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func versions(t *testing.T, f func(t *testing.T, guest, alias, local netip.Addr)) {
	t.Run("v4", func(t *testing.T) { f(t, guest4, alias4, local4) })
	t.Run("v6", func(t *testing.T) { f(t, guest6, alias6, local6) })
}

func TestExchange(t *testing.T) {
	versions(t, func(t *testing.T, guest, alias, local netip.Addr) {
		server := echoServer(t, local)
		n := start(t, nil)
		client, dst := netip.AddrPortFrom(guest, 4000), netip.AddrPortFrom(alias, server.Port())
		longest := 65507
		if guest.Is6() {
			longest = 65536 - ipv6HdrLen - udpHdrLen // the MTU of loopback: IPv6 is not cut on its way
		}
		for _, size := range []int{0, 1, 1472, 9000, longest} {
			payload := bytes.Repeat([]byte{byte(size)}, size)
			n.send(client, dst, 64, payload)
			a := next(t, n.datagrams)
			if a.from != dst || a.to != client || !bytes.Equal(a.payload, payload) {
				t.Fatalf("%d bytes from %s to %s, want %d from %s to %s", len(a.payload), a.from, a.to, size, dst, client)
			}
		}
		if s := n.Stats(); s.Flows != 1 || s.Dropped != 0 || s.Refused != 0 || s.Errors != 0 {
			t.Errorf("stats %+v", s)
		}
	})
}

// Answers that come at once are all carried on, whatever a system call takes.
func TestManyAnswersForOne(t *testing.T) {
	const count = 100
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(local4, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n := start(t, nil)
	dst := netip.AddrPortFrom(alias4, c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	n.send(netip.AddrPortFrom(guest4, 1), dst, 64, []byte("go"))
	_, from, err := c.ReadFromUDPAddrPort(make([]byte, 10))
	if err != nil {
		t.Fatal(err)
	}
	for i := range count {
		if _, err := c.WriteToUDPAddrPort([]byte{byte(i)}, from); err != nil {
			t.Fatal(err)
		}
	}
	for i := range count {
		if a := next(t, n.datagrams); len(a.payload) != 1 || a.payload[0] != byte(i) {
			t.Fatalf("answer %d is %v", i, a.payload)
		}
	}
}

func TestRefusedPort(t *testing.T) {
	versions(t, func(t *testing.T, guest, alias, local netip.Addr) {
		n := start(t, nil)
		client, dst := netip.AddrPortFrom(guest, 4000), netip.AddrPortFrom(alias, deafPort(t, local))
		for range 3 {
			n.send(client, dst, 64, []byte("anybody?"))
			n.wantUDPError(t, icmperror.PortUnreachable(guest.Is4()), alias, client, dst)
		}
	})
}

// Somebody begins to listen where nobody did: the flow goes on.
func TestRefusedThenHeard(t *testing.T) {
	n := start(t, nil)
	client, dst := netip.AddrPortFrom(guest4, 4000), netip.AddrPortFrom(alias4, deafPort(t, local4))
	n.send(client, dst, 64, []byte("anybody?"))
	n.wantUDPError(t, icmperror.PortUnreachable(true), alias4, client, dst)
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(local4, dst.Port())))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n.send(client, dst, 64, []byte("now?"))
	b := make([]byte, 10)
	c.SetReadDeadline(time.Now().Add(patience))
	k, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:k]) != "now?" {
		t.Fatalf("%q, %v", b[:k], err)
	}
	c.WriteToUDPAddrPort([]byte("yes"), from)
	if a := next(t, n.datagrams); string(a.payload) != "yes" {
		t.Errorf("%q, want yes", a.payload)
	}
}

func TestForbidden(t *testing.T) {
	for _, a := range []struct{ guest, dst netip.Addr }{{guest4, forbidden4}, {guest6, forbidden6}} {
		n := start(t, nil)
		client, dst := netip.AddrPortFrom(a.guest, 4000), netip.AddrPortFrom(a.dst, 9)
		n.send(client, dst, 64, []byte("x"))
		n.wantUDPError(t, icmperror.Prohibited(a.guest.Is4()), a.dst, client, dst)
		n.ping(a.guest, a.dst, 64, 1, 1, nil)
		n.wantError(t, icmperror.Prohibited(a.guest.Is4()), a.dst, a.guest, a.dst)
		if s := n.Stats(); s.Flows != 0 || s.Refused != 1 || s.EchoRefused != 1 {
			t.Errorf("stats %+v", s)
		}
		n.stop()
	}
}

// A guest that asks for errors without end gets some; others get theirs all the same.
func TestErrorsAreLimited(t *testing.T) {
	n := start(t, nil)
	const burst = 100 // errors that there are at once
	for i := range 10 * burst {
		n.send(netip.AddrPortFrom(guest4, uint16(i+1)), netip.AddrPortFrom(forbidden4, 9), 64, nil)
	}
	if s := n.Stats(); s.Errors < burst || s.Errors > 5*burst || s.Errors+s.ErrorsHeld != 10*burst {
		t.Errorf("%d errors, %d held", s.Errors, s.ErrorsHeld)
	}
	before := n.Stats().Errors
	n.send(netip.AddrPortFrom(guest4.Next(), 1), netip.AddrPortFrom(forbidden4, 9), 64, nil)
	if n.Stats().Errors != before+1 {
		t.Error("another guest got no error")
	}
}

func TestNothingBeforeOrAfterRun(t *testing.T) {
	n := start(t, nil)
	n.stop()
	idle := New(n.cfg)
	server := echoServer(t, local4)
	for _, f := range []*Flows{n.Flows, idle} {
		f.UDP(netip.AddrPortFrom(guest4, 1), netip.AddrPortFrom(alias4, server.Port()), 64, nil, [][]byte{[]byte("x")})
		f.Echo(guest4, alias4, 64, nil, request(guest4, alias4, 1, 1, nil))
		if s := f.Stats(); s.Flows != 0 || s.Echoes != 0 || s.Refused != 1 || s.EchoRefused != 1 {
			t.Errorf("stats %+v", s)
		}
	}
	// What was asked for too early is no reason to be without echoes later.
	n.Flows = idle
	run(t, idle)
	n.ping(guest4, alias4, 64, 1, 1, []byte("x"))
	n.wantReply(t, guest4, alias4, 1, 1, []byte("x"))
}
