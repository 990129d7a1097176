package vmnet

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/usermode/l2"
)

// usage is what a process holds.
type usage struct {
	routines, files int
	heap            uint64
}

func used(t *testing.T) usage {
	t.Helper()
	runtime.GC()
	runtime.GC() // pools let go the second time
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return usage{runtime.NumGoroutine(), len(fds), m.HeapAlloc + m.StackInuse}
}

// TestSoak has machines connect, send, reconnect, and talk rubbish: what the process holds stays the same, and others notice nothing.
// USERNET_TEST_SOAK is how long, as 10m; otherwise it is seconds.
func TestSoak(t *testing.T) {
	length := 4 * time.Second
	if s := os.Getenv("USERNET_TEST_SOAK"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		length = d
	} else if testing.Short() {
		t.Skip("short")
	}
	cfg := testConfig(t)
	cfg.Log = nil
	b := newBed(t, cfg)
	m := b.machine(2, l2.Usernet)
	to := (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), echo)
	service := m.listen(t, netip.AddrPortFrom(m.addr, 0), echo)
	wanderer := b.wanderer(t)
	round := func() { // registers nothing for the end of the test, which would look like a leak
		c, err := m.dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, c, "out")
		c.Close()
		in, err := b.DialTCP(t.Context(), netip.MustParseAddrPort("192.0.2.7:0"), service)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, in, "in")
		in.Close()
		near, far := uncleanedPair(t, "tcp", "127.0.0.1:0")
		joined := make(chan error, 1)
		go func() { joined <- b.JoinTCP(t.Context(), near, netip.AddrPort{}, service) }()
		exchange(t, far, "joined")
		far.Close()
		if err := <-joined; err != nil {
			t.Fatal(err)
		}
		b.rubbish(t)
		b.babble(t)
		wanderer.reconnect()
	}
	for range 20 {
		round()
	}
	settled := func() usage {
		var u usage
		eventually(t, "all is over", func() bool {
			s := b.Stats()
			return s.Conns == 0 && s.Pending == 0 && s.Inbound == 0
		})
		time.Sleep(1500 * time.Millisecond) // TIME_WAIT is a second
		u = used(t)
		return u
	}
	before := settled()
	rounds := 0
	for end := time.Now().Add(length); time.Now().Before(end); rounds++ {
		round()
		if rounds%100 == 0 { // the same with a kernel, whose old connection is noticed late
			mac, out := m.mac(), m.out
			m.die()
			m.plug(b, []l2.Framing{l2.HyperKit, l2.Usernet}[rounds/100%2])
			m.setMAC(mac)
			m.setAddr()
			c := m.mustDial("tcp", to)
			exchange(t, c, "back")
			c.Close()
			out()
		}
	}
	after := settled()
	t.Logf("%d rounds: %+v, then %+v", rounds, before, after)
	if after.routines > before.routines+20 || after.files > before.files+10 || after.heap > before.heap+16<<20 {
		t.Errorf("%+v became %+v after %d rounds", before, after, rounds)
	}
}

// rubbish has a machine come, say some hundred frames of which each is wrong in places, and go.
func (b *bed) rubbish(t *testing.T) {
	t.Helper()
	conn, _, end := b.port(l2.HyperKit, 1500)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { drainUntil(ctx, conn) })
	link := l2.Stream(conn, l2.Options{})
	all := seeds()
	var frames []l2.Frame
	for range 300 {
		f := slices.Clone(all[rand.IntN(len(all))])
		for range rand.IntN(4) {
			f[rand.IntN(len(f))] = byte(rand.Uint32())
		}
		frames = append(frames, l2.Frame{Head: f})
	}
	if _, err := link.Send(frames); err != nil {
		t.Fatal(err)
	}
	cancel()
	wg.Wait()
	conn.Close()
	end()
}

// babble has a machine come whose stream is noise.
func (b *bed) babble(t *testing.T) {
	t.Helper()
	conn, p, end := b.port([]l2.Framing{l2.HyperKit, l2.QEMU, l2.Usernet}[rand.IntN(3)], 1500)
	noise := make([]byte, 4096)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Write(noise); err != nil && p.Stats() == (l2.Stats{}) && slices.Contains(b.sw.Ports(), p) {
		t.Fatal(err)
	}
	conn.Close()
	end()
}

// wanderer is a machine that connects anew each time before its old connection is noticed to be dead.
type wanderer struct {
	b     *bed
	t     *testing.T
	frame l2.Frame // a question to an echo server in the network
	leave func()   // ends the old connection
}

func (b *bed) wanderer(t *testing.T) *wanderer {
	t.Helper()
	server, err := b.ListenUDP(7)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for buf := make([]byte, 1500); ; {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			server.WriteTo(buf[:n], from)
		}
	})
	f := udpFrame(netip.AddrPortFrom(netip.MustParseAddr("192.168.127.88"), 7), netip.AddrPortFrom(gateway, 7), []byte("where am I"))
	copy(f[6:], []byte{2, 0, 0, 0, 0, 88})
	w := &wanderer{b: b, t: t, frame: l2.Frame{Head: f}, leave: func() {}}
	t.Cleanup(func() {
		w.leave()
		server.Close()
		wg.Wait()
	})
	return w
}

// reconnect comes by a new port, is answered there, and leaves the old one.
func (w *wanderer) reconnect() {
	w.t.Helper()
	conn, _, end := w.b.port(l2.QEMU, 1500)
	link := l2.Stream(conn, l2.Options{Framing: l2.QEMU})
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := link.Send([]l2.Frame{w.frame}); err != nil {
		w.t.Fatal(err)
	}
	for answered := false; !answered; {
		frames, err := link.Receive()
		if err != nil {
			w.t.Fatalf("no answer by the new connection: %v", err)
		}
		for i := range frames {
			answered = answered || bytes.Contains(frames[i].Head, []byte("where am I"))
		}
	}
	w.leave()
	w.leave = func() {
		conn.Close()
		end()
	}
}

func drainUntil(ctx context.Context, c net.Conn) {
	defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })()
	io.Copy(io.Discard, struct{ io.Reader }{c})
}

// BenchmarkDeliver is what a datagram to the network's own resolver costs, and its answer.
func BenchmarkDeliver(b *testing.B) {
	n, port := lone(b)
	s, err := n.ListenUDP(53)
	if err != nil {
		b.Fatal(err)
	}
	frames := []l2.Frame{{Head: udpFrame(netip.AddrPortFrom(guest4, 9), netip.AddrPortFrom(fuzzConfig().Gateway, 53), make([]byte, 40))}}
	buf := make([]byte, 1500)
	b.ReportAllocs()
	for b.Loop() {
		n.Deliver(port, frames)
		k, from, err := s.ReadFrom(buf)
		if err != nil {
			b.Fatal(err)
		}
		s.WriteTo(buf[:k], from)
	}
}

// TestSteadyState: a datagram, from a machine to flows or back, needs no memory of its own.
func TestSteadyState(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector empties pools")
	}
	n, port := lone(t)
	world := netip.MustParseAddr("203.0.113.9")
	frames := []l2.Frame{{Head: udpFrame(netip.AddrPortFrom(guest4, 9), netip.AddrPortFrom(world, 9), make([]byte, 1400))}}
	n.Deliver(port, frames)
	if got := testing.AllocsPerRun(1000, func() { n.Deliver(port, frames) }); got > 0 {
		t.Errorf("%v allocations for each datagram of a machine", got)
	}
	payload := [][]byte{make([]byte, 1200)}
	from, to := netip.AddrPortFrom(world, 9), netip.AddrPortFrom(guest4, 9)
	if got := testing.AllocsPerRun(1000, func() { n.sendUDP(from, to, payload) }); got > 0 {
		t.Errorf("%v allocations for each datagram to a machine", got)
	}
}
