//go:build unix

package l2

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAllocs: frames cross the switch without allocation.
func TestAllocs(t *testing.T) {
	for _, fr := range streams {
		b := newBed(t, Config{})
		one, two := b.stream(1, Options{Framing: fr}, PortConfig{}), b.stream(2, Options{Framing: fr}, PortConfig{})
		one.say(broadcast, 1)
		two.hears(1)
		two.say(one.mac, 1)
		one.hears(1)
		batch := make([]Frame, 32)
		for i := range batch {
			batch[i] = Frame{Head: frame(one.mac, two.mac, 1514, uint32(i))}
		}
		one.conn.SetReadDeadline(time.Now().Add(time.Minute))
		round := func() {
			if _, err := two.Send(batch); err != nil {
				t.Fatal(err)
			}
			for got := 0; got < len(batch); {
				frames, err := one.Receive()
				if err != nil {
					t.Fatal(err)
				}
				got += len(frames)
			}
		}
		round()
		if n := testing.AllocsPerRun(200, round); n > 1 { // of 32 frames; the writer's first rounds grow its buffer
			t.Errorf("%s: %.1f allocations for %d frames", fr, n, len(batch))
		}
	}
}

// TestPacketAllocs is the same for a socket of packets.
func TestPacketAllocs(t *testing.T) {
	b := newBed(t, Config{})
	host, mine := socketpair(t, unix.SOCK_SEQPACKET)
	l, err := Packets(host, Options{MTU: 1500})
	if err != nil {
		t.Fatal(err)
	}
	p, _ := b.run(l, PortConfig{MACs: []MAC{guestMAC(1)}})
	me, err := Packets(mine, Options{MTU: 1500})
	if err != nil {
		t.Fatal(err)
	}
	batch := make([]Frame, 8)
	for i := range batch {
		batch[i] = Frame{Head: frame(p.cfg.MACs[0], gatewayMAC, 1514, uint32(i))}
	}
	round := func() {
		b.sw.Send(batch)
		for got := 0; got < len(batch); {
			frames, err := me.Receive()
			if err != nil {
				t.Fatal(err)
			}
			got += len(frames)
		}
	}
	round()
	if n := testing.AllocsPerRun(200, round); n > 1 {
		t.Errorf("%.1f allocations for %d frames", n, len(batch))
	}
}

// TestSoak has guests come and go that send all kinds of things, while two that behave talk to each other.
func TestSoak(t *testing.T) {
	length := 3 * time.Second
	if testing.Short() {
		length = 300 * time.Millisecond
	}
	b := newBed(t, Config{Gateway: &gateway{}, MaxPorts: 16})
	one, two := b.stream(1, Options{Framing: QEMU}, PortConfig{}), b.stream(2, Options{Framing: Usernet, Takes: AllOffload}, PortConfig{})
	one.say(broadcast, 0)
	two.say(broadcast, 0)
	b.until(func() bool { return len(b.sw.Table()) == 2 })

	baseline, memory := runtime.NumGoroutine(), heap()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 5))
			for {
				select {
				case <-stop:
					return
				default:
					b.vandal(rnd)
				}
			}
		})
	}
	end := time.Now().Add(length)
	exchanges := uint32(1)
	for ; time.Now().Before(end); exchanges++ {
		one.say(two.mac, exchanges)
		hearsAmidNoise(t, two, exchanges)
		two.say(one.mac, exchanges)
		hearsAmidNoise(t, one, exchanges)
	}
	close(stop)
	wg.Wait()
	b.until(func() bool { return len(b.sw.Ports()) == 2 && len(b.sw.Table()) == 2 })
	b.until(func() bool { return runtime.NumGoroutine() <= baseline })
	if grown := heap() - memory; grown > 8<<20 {
		t.Errorf("memory has grown by %d bytes", grown)
	}
	t.Logf("%d exchanges", exchanges)
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// hearsAmidNoise waits for a frame among those that others send to everybody. They are for groups or unknown addresses, or
// random; none is as long as ours.
func hearsAmidNoise(t *testing.T, g *guest, number uint32) {
	t.Helper()
	for {
		if f := g.next(); f.Len() == 60 && f.dst() == g.mac && numberOf(f) == number {
			return
		}
	}
}

// vandal is a short life of a guest that keeps to nothing.
func (b *bed) vandal(rnd *rand.Rand) {
	fr := streams[rnd.IntN(len(streams))]
	host, mine, err := newSocketpair(unix.SOCK_STREAM)
	if err != nil {
		b.t.Error(err)
		return
	}
	ended := make(chan struct{})
	p := b.sw.NewPort(Stream(host, Options{Framing: fr, Takes: AllOffload}), PortConfig{})
	go func() {
		p.Run(b.ctx)
		close(ended)
	}()
	mine.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	for range rnd.IntN(200) {
		var wire []byte
		for range rnd.IntN(20) {
			body := make([]byte, rnd.IntN(2000))
			for i := range min(len(body), 60) {
				body[i] = byte(rnd.Uint32())
			}
			if len(body) >= headerLen && rnd.IntN(2) == 0 {
				dst := [...]MAC{broadcast, guestMAC(1), guestMAC(2), gatewayMAC}[rnd.IntN(4)]
				copy(body, dst[:])
				body[6] &^= 1
			}
			v := Virtio{Flags: uint8(rnd.IntN(4)), GSOType: uint8(rnd.IntN(6)), GSOSize: uint16(rnd.IntN(3000)), CsumStart: uint16(rnd.IntN(60)), CsumOffset: 16}
			wire = append(fr.appendPrefix(wire, len(body), v), body...)
		}
		if rnd.IntN(50) == 0 {
			wire = wire[:rnd.IntN(len(wire)+1)] // and out of step from here
		}
		if _, err := mine.Write(wire); err != nil {
			break
		}
	}
	mine.Close()
	<-ended
}
