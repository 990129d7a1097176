package vmnet

import (
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
	round := func() {
		c := m.mustDial("tcp", to)
		exchange(t, c, "out")
		c.Close()
		in, err := b.DialTCP(t.Context(), netip.MustParseAddrPort("192.0.2.7:0"), service)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, in, "in")
		in.Close()
		near, far := pair(t, "tcp", "127.0.0.1:0")
		joined := make(chan error, 1)
		go func() { joined <- b.JoinTCP(t.Context(), near, netip.AddrPort{}, service) }()
		exchange(t, far, "joined")
		far.Close()
		if err := <-joined; err != nil {
			t.Fatal(err)
		}
		b.rubbish(t)
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
	payload := make([]byte, 1200)
	from, to := netip.AddrPortFrom(world, 9), netip.AddrPortFrom(guest4, 9)
	if got := testing.AllocsPerRun(1000, func() { n.sendUDP(from, to, payload) }); got > 0 {
		t.Errorf("%v allocations for each datagram to a machine", got)
	}
}
