//go:build linux

package flows

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/nonblock"
)

// What routers say comes back to the guest: as traceroute, and path MTU discovery, need it.
func TestUDPErrors(t *testing.T) {
	nettest.World(t)
	for _, v := range []struct{ guest, far, closed, router netip.Addr }{
		{guest4, nettest.Far4, nettest.Closed4, nettest.Router4},
		{guest6, nettest.Far6, nettest.Closed6, nettest.Router6},
	} {
		v4 := v.guest.Is4()
		t.Run(fmt.Sprintf("v4=%t", v4), func(t *testing.T) {
			n := start(t, nil)
			exceeded, denied := timeExceeded(v4), icmperror.Prohibited(v4)
			client := netip.AddrPortFrom(v.guest, 5000)
			// traceroute: the same flow, one more hop each time.
			far := netip.AddrPortFrom(v.far, 33434)
			n.send(client, far, 1, []byte("x"))
			n.wantUDPError(t, exceeded, v.router, client, far)
			n.send(client, far, 2, []byte("x"))
			n.wantUDPError(t, icmperror.PortUnreachable(v4), v.far, client, far)
			closed := netip.AddrPortFrom(v.closed, 9)
			n.send(client, closed, 64, []byte("x"))
			n.wantUDPError(t, denied, v.router, client, closed)
			// The router says that it is too long for the way, and then the host knows.
			n.send(client, far, 64, make([]byte, 1450))
			n.wantUDPError(t, icmperror.TooBig(v4, nettest.Narrow), v.router, client, far)
			n.send(client, far, 64, make([]byte, 1450))
			n.wantUDPError(t, icmperror.TooBig(v4, nettest.Narrow), v.far, client, far)
		})
	}
}

// A datagram that may be cut is; with DF, one that does not fit into the first link does not leave the host.
func TestDontFragment(t *testing.T) {
	far := nettest.World(t)
	var server netip.AddrPort
	inside(t, far, func() { server = echoServer(t, nettest.Far4) })
	n := start(t, nil)
	client := netip.AddrPortFrom(guest4, 5000)
	payload := bytes.Repeat([]byte{5}, 8000)
	n.send(client, server, 64, payload)
	n.wantUDPError(t, icmperror.TooBig(true, 1500), server.Addr(), client, server)
	var b [ipv4HdrLen + udpHdrLen]byte
	n.UDP(client, server, 64, putUDP(b[:], client, server, len(payload)), [][]byte{payload})
	if a := next(t, n.datagrams); !bytes.Equal(a.payload, payload) {
		t.Errorf("%d bytes came back, want %d", len(a.payload), len(payload))
	}
}

// Datagrams that come together leave together where they can, and all the same where they cannot: as they were, and in their order.
func TestBursts(t *testing.T) {
	t.Run("by one call", testBursts)
	cuts := nonblock.CutsDatagrams
	nonblock.CutsDatagrams = func() bool { return false }
	defer func() { nonblock.CutsDatagrams = cuts }()
	t.Run("by a kernel that is too old", testBursts)
}

func testBursts(t *testing.T) {
	far := nettest.World(t)
	var server netip.AddrPort
	inside(t, far, func() { server = echoServer(t, nettest.Far4) })
	client := netip.AddrPortFrom(guest4, 5000)
	for _, c := range []struct {
		name  string
		sizes []int
	}{
		{"even", []int{1000, 1000, 1000, 1000}},
		{"the last is shorter", []int{1000, 1000, 1000, 1}},
		{"uneven", []int{1000, 1, 1000, 2000, 3}},
		{"with nothing in one", []int{7, 0, 7, 7}},
		{"with nothing in any", []int{0, 0}},
		{"longer than the way is wide", []int{8000, 8000, 20}},
		{"more than one packet's", slices.Repeat([]int{1472}, 60)},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := start(t, nil)
			var burst [][]byte
			for i, size := range c.sizes {
				burst = append(burst, bytes.Repeat([]byte{byte(i)}, size))
			}
			var b [ipv4HdrLen + udpHdrLen]byte
			for range 2 { // the second time it is known what is not to be had
				n.UDP(client, server, 64, putUDP(b[:], client, server, c.sizes[0]), burst)
				for i := range burst {
					if a := next(t, n.datagrams); a.from != server || a.to != client || !bytes.Equal(a.payload, burst[i]) {
						t.Fatalf("datagram %d came back as %d bytes, want %d", i, len(a.payload), len(burst[i]))
					}
				}
			}
			if s := n.Stats(); s.Flows != 1 || s.Dropped != 0 || s.Refused != 0 || s.Errors != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// What is wrong with an earlier datagram keeps no later one of a burst back, and a guest is told of what is too long.
func TestBurstErrors(t *testing.T) {
	far := nettest.World(t)
	n := start(t, nil)
	client, server := netip.AddrPortFrom(guest4, 5000), netip.AddrPortFrom(nettest.Far4, 4567)
	two := [][]byte{[]byte("12"), []byte("34")}
	n.send(client, server, 64, []byte("is anybody there?"))
	n.wantUDPError(t, icmperror.PortUnreachable(true), server.Addr(), client, server)
	inside(t, far, func() {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(server))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		n.send(client, server, 64, two...)
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		for _, want := range two {
			b := make([]byte, 10)
			if k, err := c.Read(b); err != nil || !bytes.Equal(b[:k], want) {
				t.Fatalf("%q, %v, want %q", b[:k], err, want)
			}
		}
	})
	long := make([]byte, 2000)
	n.send(client, server, 64, long, long)
	n.wantUDPError(t, icmperror.TooBig(true, 1500), server.Addr(), client, server)
	n.send(netip.AddrPortFrom(guest4, 5001), netip.AddrPortFrom(forbidden4, 1), 64, two...)
	if s := n.Stats(); s.Refused != 2 || s.Dropped != 2 {
		t.Errorf("stats %+v, want 2 refused and 2 dropped", s)
	}
}

func TestExpiry(t *testing.T) {
	server := echoServer(t, local4)
	deaf, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(local4, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	n := start(t, func(f *Flows) { f.udp.oneWay = 50 * time.Millisecond })
	answered := netip.AddrPortFrom(alias4, server.Port())
	silent := netip.AddrPortFrom(alias4, deaf.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	n.send(netip.AddrPortFrom(guest4, 1), answered, 64, []byte("x"))
	next(t, n.datagrams)
	n.send(netip.AddrPortFrom(guest4, 1), silent, 64, []byte("x"))
	if got := n.Stats().Flows; got != 2 {
		t.Errorf("%d flows, want 2", got)
	}
	await(t, func() bool { return n.Stats().Flows == 1 }) // the one without an answer goes sooner
	if n.udp.find(flowKey{netip.AddrPortFrom(guest4, 1), answered}) == nil {
		t.Error("the flow with answers has gone")
	}
	n.udp.mu.Lock()
	n.udp.idle = 50 * time.Millisecond
	n.udp.mu.Unlock()
	await(t, func() bool { return n.Stats().Flows == 0 })
	n.send(netip.AddrPortFrom(guest4, 1), answered, 64, []byte("again"))
	if a := next(t, n.datagrams); string(a.payload) != "again" {
		t.Errorf("%q, want again", a.payload)
	}
}

func TestPatience(t *testing.T) {
	table := newUDPTable(New(Config{}))
	for _, v := range []struct {
		port     uint16
		answered bool
		want     time.Duration
	}{{53, true, dnsIdle}, {53, false, dnsIdle}, {443, true, udpIdle}, {443, false, oneWayIdle}} {
		f := &udpFlow{key: flowKey{dst: netip.AddrPortFrom(alias4, v.port)}}
		f.answered.Store(v.answered)
		if got := table.patience(f); got != v.want {
			t.Errorf("port %d, answered %t: %v, want %v", v.port, v.answered, got, v.want)
		}
	}
}

// One guest opens flows without end: it keeps to its share, and what others have stays.
func TestGreedyGuest(t *testing.T) {
	server := echoServer(t, local4)
	n := start(t, func(f *Flows) { f.udp.total, f.udp.each = 100, 60 })
	dst := netip.AddrPortFrom(alias4, server.Port())
	var modest []netip.AddrPort
	for i := range 50 {
		modest = append(modest, netip.AddrPortFrom(guest4.Next(), uint16(i+1)))
		n.send(modest[i], dst, 64, []byte("modest"))
		next(t, n.datagrams)
	}
	for i := range 500 {
		n.send(netip.AddrPortFrom(guest4, uint16(i+1)), dst, 64, []byte("greedy"))
		next(t, n.datagrams)
	}
	if s := n.Stats(); s.Flows != 100 || s.Evicted != 450 {
		t.Errorf("%d flows, %d evicted, want 100 and 450", s.Flows, s.Evicted)
	}
	for _, client := range modest {
		if n.udp.find(flowKey{client, dst}) == nil {
			t.Errorf("%s has lost its flow", client)
		}
	}
}

func TestLimitOfOne(t *testing.T) {
	server := echoServer(t, local4)
	n := start(t, func(f *Flows) { f.udp.each = 10 })
	dst := netip.AddrPortFrom(alias4, server.Port())
	for i := range 100 {
		n.send(netip.AddrPortFrom(guest4, uint16(i+1)), dst, 64, []byte("x"))
		next(t, n.datagrams)
	}
	if s := n.Stats(); s.Flows != 10 || s.Evicted != 90 {
		t.Errorf("%d flows, %d evicted, want 10 and 90", s.Flows, s.Evicted)
	}
	n.udp.mu.Lock()
	defer n.udp.mu.Unlock()
	if len(n.udp.clients) != 1 || len(n.udp.clients[guest4].flows) != 10 {
		t.Errorf("%d clients", len(n.udp.clients))
	}
}

// Without descriptors, what has been idle makes room.
func TestNoDescriptorsLeft(t *testing.T) {
	server := echoServer(t, local4)
	n := start(t, nil)
	dst := netip.AddrPortFrom(alias4, server.Port())
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	const few = 64
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: few, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	for i := range 2 * few {
		client := netip.AddrPortFrom(guest4, uint16(i+1))
		n.send(client, dst, 64, []byte("x"))
		if a := next(t, n.datagrams); a.to != client {
			t.Fatalf("an answer for %s, want one for %s", a.to, client)
		}
	}
	if s := n.Stats(); s.Evicted == 0 || s.Refused != 0 {
		t.Errorf("stats %+v", s)
	}
}

// Many goroutines, few flows that make room for each other all the time: nobody gets another's datagrams, and nothing is
// left in the end. Each has a server of its own, since a port of the host may be used again at once when so many make room.
func TestChurn(t *testing.T) {
	const guests, ports = 3, 20
	clients, servers := make([]netip.AddrPort, guests*ports), make([]netip.AddrPort, guests*ports)
	for i := range clients {
		clients[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 127, byte(2 + i/ports)}), uint16(1+i%ports))
		servers[i] = echoServer(t, local4)
	}
	var wrong sync.Map
	var answers atomic.Int64
	f := New(Config{
		Resolve: resolve,
		SendUDP: func(_, to netip.AddrPort, payloads [][]byte) {
			for _, p := range payloads {
				if answers.Add(1); string(p) != to.String() {
					wrong.Store(to, string(p))
				}
			}
		},
		SendICMP: func(_, _ netip.Addr, _ []byte) {},
		Log:      slog.New(slog.DiscardHandler),
	})
	f.udp.total, f.udp.each = 16, 12
	stop := run(t, f)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				k := (i*7 + g) % len(clients)
				dst := netip.AddrPortFrom(alias4, servers[k].Port())
				f.UDP(clients[k], dst, 64, nil, [][]byte{[]byte(clients[k].String())})
			}
		})
	}
	wg.Wait()
	stop()
	wrong.Range(func(to, payload any) bool {
		t.Errorf("%s got %s", to, payload)
		return true
	})
	if answers.Load() == 0 {
		t.Error("no answers")
	}
	f.udp.mu.Lock()
	defer f.udp.mu.Unlock()
	if len(f.udp.clients) != 0 {
		t.Errorf("%d clients are left", len(f.udp.clients))
	}
	for i := range f.udp.shards {
		if len(f.udp.shards[i].flows) != 0 {
			t.Errorf("shard %d has flows", i)
		}
	}
}

// Run used to wait for a goroutine that waited for Run, when a datagram came while it ended.
func TestStopUnderTraffic(t *testing.T) {
	dst := netip.AddrPortFrom(alias4, echoServer(t, local4).Port())
	for range 100 {
		var f *Flows
		f = New(Config{
			Resolve: resolve,
			SendUDP: func(from, to netip.AddrPort, payloads [][]byte) { // and again, until the end
				f.UDP(to, from, 64, nil, payloads)
			},
			SendICMP: func(_, _ netip.Addr, _ []byte) {},
			Log:      slog.New(slog.DiscardHandler),
		})
		stop := run(t, f)
		for i := range 20 {
			f.UDP(netip.AddrPortFrom(guest4, uint16(1+i)), dst, 64, nil, [][]byte{[]byte("x")})
		}
		stop()
	}
}
