//go:build unix

package l2

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLearning(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw})
	one := b.stream(1, Options{Framing: HyperKit}, PortConfig{Name: "one"})
	two := b.stream(2, Options{Framing: QEMU}, PortConfig{})
	three := b.stream(3, Options{Framing: Usernet}, PortConfig{})

	one.say(broadcast, 1)
	two.hears(1)
	three.hears(1)
	two.say(guestMAC(9), 2) // unknown
	one.hears(2)
	three.hears(2)
	two.say(one.mac, 3)
	one.hears(3)
	three.say(one.mac, 4)
	one.hears(4)
	three.say(gatewayMAC, 5)
	b.until(func() bool { return slices.Equal(gw.numbers(), []uint32{1, 5}) })
	if want := map[MAC]int{one.mac: one.port.ID, two.mac: two.port.ID, three.mac: three.port.ID}; !maps.Equal(b.sw.Table(), want) {
		t.Errorf("table %v, want %v", b.sw.Table(), want)
	}
	if p := b.sw.PortOf(two.mac); p != two.port || b.sw.PortOf(guestMAC(9)) != nil {
		t.Errorf("port %v", p)
	}
	// Nobody else has heard what was for one.
	two.say(three.mac, 6)
	three.hears(6)
	one.say(two.mac, 7)
	two.hears(7)
	one.say(one.mac, 8) // to itself
	b.sw.Send([]Frame{{Head: frame(one.mac, gatewayMAC, 60, 9)}, {Head: frame(broadcast, gatewayMAC, 60, 10)}, {Head: frame(two.mac, gatewayMAC, 60, 11)}})
	one.hears(9)
	one.hears(10)
	two.hears(10)
	two.hears(11)
	three.hears(10)
	b.until(func() bool { return one.port.Stats() == Stats{RxFrames: 3, RxBytes: 180, TxFrames: 5, TxBytes: 300} })
	if b.sw.Ports()[0].Name != "one" {
		t.Errorf("ports %v", b.sw.Ports())
	}
}

// TestHijack has a guest send with addresses that are not its own.
func TestHijack(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw})
	b.sw.table.quiet = time.Hour
	victim := b.stream(1, Options{}, PortConfig{})
	thief := b.stream(2, Options{}, PortConfig{})
	victim.say(thief.mac, 1)
	thief.hears(1)
	for _, src := range []MAC{victim.mac, gatewayMAC, {}, broadcast, {1, 0, 0x5e, 0, 0, 1}} {
		thief.send(Frame{Head: frame(gatewayMAC, src, 60, 2)})
	}
	thief.say(victim.mac, 3)
	victim.hears(3)
	if n := thief.port.Stats().Spoofed; n != 5 {
		t.Errorf("%d frames counted as spoofed, want 5", n)
	}
	if got := gw.numbers(); len(got) != 0 {
		t.Errorf("the gateway has got %d", got)
	}
	if id := b.sw.Table()[victim.mac]; id != victim.port.ID {
		t.Errorf("the address is behind port %d", id)
	}

	// It moves when its port is gone.
	victim.conn.Close()
	if err := <-victim.ended; err != io.EOF {
		t.Errorf("port ends with %v", err)
	}
	thief.send(Frame{Head: frame(gatewayMAC, victim.mac, 60, 4)})
	b.until(func() bool { return slices.Equal(gw.numbers(), []uint32{4}) })
}

// TestClaims: an address that was given to a port cannot be had before it by a guest that is faster.
func TestClaims(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw})
	squatter := b.stream(7, Options{}, PortConfig{})
	squatter.send(Frame{Head: frame(gatewayMAC, guestMAC(1), 60, 1)})
	b.until(func() bool { return len(gw.numbers()) == 1 })
	owner := b.stream(1, Options{}, PortConfig{MACs: []MAC{guestMAC(1)}, Strict: true})
	squatter.send(Frame{Head: frame(gatewayMAC, guestMAC(1), 60, 2)})
	squatter.say(owner.mac, 3)
	owner.hears(3)
	owner.send(Frame{Head: frame(gatewayMAC, guestMAC(5), 60, 4)}) // strict
	owner.say(gatewayMAC, 5)
	b.until(func() bool { return slices.Equal(gw.numbers(), []uint32{1, 5}) })
	if s, o := squatter.port.Stats().Spoofed, owner.port.Stats().Spoofed; s != 1 || o != 1 {
		t.Errorf("spoofed: %d and %d, want 1 and 1", s, o)
	}
	host, _ := socketpair(t, unix.SOCK_STREAM)
	if err := b.sw.NewPort(Stream(host, Options{}), PortConfig{MACs: []MAC{guestMAC(1)}}).Run(b.ctx); !errors.Is(err, ErrClaimed) {
		t.Errorf("a second owner: %v", err)
	}
	if id := b.sw.Table()[owner.mac]; id != owner.port.ID {
		t.Errorf("behind port %d", id)
	}
}

// TestSpray has a guest use many addresses: it pushes out its own ones only.
func TestSpray(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw, MACsPerPort: 8})
	quiet := b.stream(1, Options{}, PortConfig{})
	loud := b.stream(2, Options{}, PortConfig{})
	quiet.say(gatewayMAC, 1)
	b.until(func() bool { return len(b.sw.Table()) == 1 })
	for i := range 10000 {
		loud.send(Frame{Head: frame(gatewayMAC, MAC{2, 0, 0, byte(i >> 16), byte(i >> 8), byte(i)}, 60, 2)})
	}
	loud.say(quiet.mac, 3)
	quiet.hears(3)
	table := b.sw.Table()
	if len(table) != 1+8 || table[quiet.mac] != quiet.port.ID || table[loud.mac] != loud.port.ID {
		t.Errorf("table %v", table)
	}
	loud.conn.Close()
	<-loud.ended
	if table := b.sw.Table(); len(table) != 1 {
		t.Errorf("of a port that has ended there is %v", table)
	}
}

// TestFlood: what is for everybody is limited, to other guests; the gateway gets it.
func TestFlood(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw})
	loud, other := b.stream(1, Options{}, PortConfig{}), b.stream(2, Options{}, PortConfig{})
	const n = 20000
	start := time.Now()
	for i := range uint32(n) {
		loud.say(broadcast, i)
	}
	b.until(func() bool { gw.mu.Lock(); defer gw.mu.Unlock(); return gw.n == n })
	other.say(gatewayMAC, 0)
	b.until(func() bool { return b.sw.PortOf(other.mac) != nil })
	loud.say(other.mac, n) // behind all of them
	other.hears(0)
	for numberOf(other.next()) != n {
	}
	allowed := floodBurst + floodRate*time.Since(start).Seconds() + 1
	if passed := n - loud.port.Stats().Unflooded; float64(passed) > allowed || passed < floodBurst {
		t.Errorf("%d frames passed where %d to %.0f are allowed", passed, floodBurst, allowed)
	}
}

// TestStuckPort: a guest that does not read holds up nobody, and what waits for it is bounded.
func TestStuckPort(t *testing.T) {
	b := newBed(t, Config{})
	stuck := b.stream(1, Options{Framing: QEMU}, PortConfig{})
	talker, other := b.stream(2, Options{Framing: QEMU}, PortConfig{}), b.stream(3, Options{Framing: QEMU}, PortConfig{})
	stuck.say(broadcast, 1)
	talker.hears(1)
	other.hears(1)
	other.say(talker.mac, 2)
	talker.hears(2)
	before := stuck.port.Stats().TxFrames
	const rounds, burst = 3000, 32
	f := Frame{Head: frame(stuck.mac, talker.mac, 1514, 3)}
	batch := slices.Repeat([]Frame{f}, burst)
	for i := range uint32(rounds) {
		talker.send(append(batch, Frame{Head: frame(other.mac, talker.mac, 60, i)})...)
		if i%100 == 0 {
			talker.send(Frame{Head: frame(other.mac, talker.mac, 60, i)})
		}
	}
	for i := range uint32(rounds) {
		other.hears(i)
		if i%100 == 0 {
			other.hears(i)
		}
	}
	s := stuck.port.Stats()
	if taken := s.TxFrames - before; s.Full == 0 || s.Full+taken != rounds*burst {
		t.Errorf("%d frames lost, %d taken, of %d", s.Full, taken, rounds*burst)
	}
	if s.TxBytes > 2*queueSize+1<<20 {
		t.Errorf("%d bytes wait", s.TxBytes)
	}
	if lost := other.port.Stats().Full; lost != 0 {
		t.Errorf("another port has lost %d", lost)
	}
}

// TestSlowPortHoldsNobody is the same with one that reads a little, and so earns that senders wait a little: not more.
func TestSlowPortHoldsNobody(t *testing.T) {
	host, _ := socketpair(t, unix.SOCK_STREAM)
	q := newQueue(Stream(host, Options{Framing: QEMU}), 2)
	q.link.out = trickle{}
	f := []Frame{{Head: frame(guestMAC(1), guestMAC(2), 1514, 0)}}
	var waited time.Duration
	const rounds = 2000
	for range rounds {
		start := time.Now()
		q.send(1, f, true)
		if d := time.Since(start); d > 100*time.Microsecond {
			waited += d
		}
	}
	// Earned: 1518 bytes once, 15 µs. Anything else is the machine's.
	if waited > time.Second {
		t.Errorf("senders have waited %v", waited)
	}
	if q.credit > maxCredit {
		t.Errorf("credit of %v", q.credit)
	}
}

// trickle takes one frame each time it is asked, and is never done.
type trickle struct{}

func (trickle) write([]byte) error        { select {} }
func (trickle) try(b []byte) (int, error) { return min(len(b), 1518), nil }

// TestShares: two sources that fill a queue have equal parts of it, and a third one still finds room.
func TestShares(t *testing.T) {
	host, _ := socketpair(t, unix.SOCK_STREAM)
	q := newQueue(Stream(host, Options{Framing: QEMU}), 4)
	q.busy = true // and nobody writes
	f := []Frame{{Head: frame(guestMAC(1), guestMAC(2), 1514, 0)}}
	alone := 0
	for q.send(1, f, false).full == 0 {
		alone += 1518
	}
	if alone < queueSize/2 || alone > queueSize*4/5 {
		t.Errorf("alone one source has %d of %d bytes", alone, queueSize)
	}
	if q.send(2, f, false).full != 0 {
		t.Error("no room for another source")
	}
	q.pending = q.pending[:0]
	clear(q.share)
	for q.send(1, f, false).full+q.send(2, f, false).full < 2 {
	}
	if d := q.share[1] - q.share[2]; d < -2*1518 || d > 2*1518 {
		t.Errorf("two sources have %d and %d bytes", q.share[1], q.share[2])
	}
	if q.send(3, f, false).full != 0 || len(q.pending) > queueSize {
		t.Errorf("no room for a third, or too much: %d bytes", len(q.pending))
	}
}

// TestMTU: what is longer than the other end's MTU is not sent; there are guests that do not survive it.
func TestMTU(t *testing.T) {
	b := newBed(t, Config{})
	small := b.stream(1, Options{MTU: 1500}, PortConfig{})
	big := b.stream(2, Options{Framing: Usernet, Takes: AllOffload}, PortConfig{})
	small.say(broadcast, 1)
	big.hears(1)
	big.send(Frame{Head: frame(small.mac, big.mac, 1519, 2)}, Frame{Head: frame(small.mac, big.mac, 1518, 3)})
	small.hears(3)
	// In segments it goes.
	f := segment(false, false, 30000, 1448)
	copy(f.Head, small.mac[:])
	copy(f.Head[6:], big.mac[:])
	big.send(f)
	got := 0
	for got < 30000 {
		next := small.next()
		got += next.Len() - int(headerLen+52)
	}
	if s := small.port.Stats(); s.Unfit != 1 {
		t.Errorf("%d frames did not fit, want 1", s.Unfit)
	}
}

// TestOffload: what one usernet peer leaves unfinished comes to another one as it is.
func TestOffload(t *testing.T) {
	b := newBed(t, Config{})
	opts := Options{Framing: Usernet, Takes: AllOffload, MTU: 1500}
	one, two := b.stream(1, opts, PortConfig{}), b.stream(2, opts, PortConfig{})
	one.say(broadcast, 1)
	two.hears(1)
	f := segment(true, false, 60000, 1428)
	copy(f.Head, one.mac[:])
	copy(f.Head[6:], two.mac[:])
	two.send(f)
	got := one.next()
	if got.Len() != f.Len() || got.Virtio.GSOSize != 1428 || got.Virtio.Flags != NeedsCsum {
		t.Errorf("got %d bytes of %d, %+v", got.Len(), f.Len(), got.Virtio)
	}
}

func TestIsolated(t *testing.T) {
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw, Isolated: true})
	one, two := b.stream(1, Options{}, PortConfig{}), b.stream(2, Options{}, PortConfig{})
	one.say(broadcast, 1)
	b.until(func() bool { return len(gw.numbers()) == 1 })
	two.say(one.mac, 2)
	two.say(guestMAC(9), 3)
	two.say(gatewayMAC, 4)
	b.until(func() bool { return len(gw.numbers()) == 2 })
	b.sw.Send([]Frame{{Head: frame(one.mac, gatewayMAC, 60, 5)}})
	one.hears(5)
}

// TestGuard has a guest pretend to be the gateway, to another one.
func TestGuard(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.168.127.1"), netip.MustParseAddr("fd00::1")
	ether := func(typ uint16, tag bool, rest ...[]byte) []byte {
		b := frame(broadcast, guestMAC(1), headerLen, 0)[:12]
		if tag {
			b = append(b, 0x81, 0, 0, 5)
		}
		return append(binary.BigEndian.AppendUint16(b, typ), slices.Concat(rest...)...)
	}
	arp := func(a netip.Addr) []byte {
		return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 2}, make([]byte, 6), a.AsSlice(), make([]byte, 10))
	}
	udp4 := func(src, dst byte) []byte {
		return slices.Concat([]byte{0x46, 0, 0, 0, 0, 0, 0, 0, 64, protoUDP}, make([]byte, 14), []byte{0, src, 0, dst, 0, 8, 0, 0})
	}
	ip6 := func(proto byte, rest ...byte) []byte {
		return slices.Concat([]byte{0x60, 0, 0, 0, 0, 0, proto, 255}, make([]byte, 32), rest)
	}
	na := func(a netip.Addr) []byte {
		return ip6(protoICMPv6, append([]byte{icmp6NeighbourAdvertisement, 0, 0, 0, 0x60, 0, 0, 0}, a.AsSlice()...)...)
	}
	g := newGuard([]netip.Addr{v4, v6})
	for _, tt := range []struct {
		name  string
		frame []byte
		stops bool
	}{
		{"ARP of its own", ether(etherARP, false, arp(netip.MustParseAddr("192.168.127.2"))), false},
		{"ARP of the gateway's", ether(etherARP, false, arp(v4)), true},
		{"ARP of the gateway's, with a tag", ether(etherARP, true, arp(v4)), true},
		{"ARP, too short", ether(etherARP, false, arp(v4)[:17]), false},
		{"DHCP offer", ether(etherIPv4, false, udp4(67, 68)), true},
		{"DHCP discover", ether(etherIPv4, false, udp4(68, 67)), false},
		{"UDP, too short", ether(etherIPv4, false, udp4(67, 68)[:26]), false},
		{"IPv4, too short", ether(etherIPv4, false, udp4(67, 68)[:19]), false},
		{"IPv4, header longer than it", ether(etherIPv4, false, append([]byte{0x4f}, udp4(67, 68)[1:24]...)), false},
		{"DHCPv6 reply", ether(etherIPv6, false, ip6(protoUDP, 2, 35, 2, 34)), true},
		{"router advertisement", ether(etherIPv6, false, ip6(protoICMPv6, 134)), true},
		{"router solicitation", ether(etherIPv6, false, ip6(protoICMPv6, 133)), false},
		{"redirect", ether(etherIPv6, false, ip6(protoICMPv6, 137)), true},
		{"neighbour advertisement of the gateway's", ether(etherIPv6, false, na(v6)), true},
		{"neighbour advertisement of its own", ether(etherIPv6, false, na(netip.MustParseAddr("fd00::2"))), false},
		{"ICMPv6, empty", ether(etherIPv6, false, ip6(protoICMPv6)), false},
		{"IPv6, too short", ether(etherIPv6, false, ip6(protoICMPv6)[:39]), false},
		{"a tag, too short", ether(etherVLAN, false), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &Frame{Head: tt.frame}
			if got := g.stops(f); got != tt.stops {
				t.Errorf("stops %v, want %v", got, tt.stops)
			}
			if newGuard(nil).stops(f) {
				t.Error("stopped with nothing to guard")
			}
		})
	}
	gw := &gateway{}
	b := newBed(t, Config{Gateway: gw, GatewayAddrs: []netip.Addr{v4}})
	one, two := b.stream(1, Options{}, PortConfig{}), b.stream(2, Options{}, PortConfig{})
	one.send(Frame{Head: ether(etherARP, false, arp(v4))})
	one.say(broadcast, 1)
	two.hears(1)
	if n := one.port.Stats().Spoofed; n != 1 {
		t.Errorf("%d frames counted, want 1", n)
	}
}

// TestFull: ports beyond the limit are refused, and have room when others end.
func TestFull(t *testing.T) {
	b := newBed(t, Config{MaxPorts: 2})
	one := b.stream(1, Options{}, PortConfig{})
	b.stream(2, Options{}, PortConfig{})
	host, guest := socketpair(t, unix.SOCK_STREAM)
	if err := b.sw.NewPort(Stream(host, Options{}), PortConfig{}).Run(b.ctx); !errors.Is(err, ErrFull) {
		t.Errorf("a third port: %v", err)
	}
	if _, err := guest.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("its connection is open: %v", err)
	}
	one.conn.Close()
	<-one.ended
	again := b.stream(1, Options{}, PortConfig{})
	two := b.stream(2, Options{}, PortConfig{})
	select {
	case err := <-two.ended:
		if !errors.Is(err, ErrFull) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the third one runs")
	}
	again.say(broadcast, 1)
}

// TestRunEnds: Run ends with its context, with the writer waiting for a guest that does not read as well.
func TestRunEnds(t *testing.T) {
	sw := NewSwitch(Config{GatewayMAC: gatewayMAC})
	for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET} {
		host, guest := socketpair(t, typ)
		l := Stream(host, Options{})
		if typ != unix.SOCK_STREAM {
			var err error
			if l, err = Packets(host, Options{}); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		p := sw.NewPort(l, PortConfig{MACs: []MAC{guestMAC(1)}})
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		f := []Frame{{Head: frame(guestMAC(1), gatewayMAC, 1514, 0)}}
		for p.Stats().Full == 0 {
			sw.Send(f)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		if n := len(sw.Ports()) + len(sw.Table()); n != 0 {
			t.Errorf("%d things left", n)
		}
		if full := sw.Send(f); full != 0 {
			t.Errorf("frames for a port that has ended: %d", full)
		}
		guest.Close()
	}
}

// TestAwaitRoom: who waits for a machine that does not read goes on when it does, when its port ends, or when he is told to.
func TestAwaitRoom(t *testing.T) {
	b := newBed(t, Config{})
	g := b.stream(1, Options{Framing: QEMU}, PortConfig{})
	f := []Frame{{Head: frame(g.mac, gatewayMAC, 60000, 0)}}
	g.say(gatewayMAC, 1)
	b.until(func() bool { return b.sw.PortOf(g.mac) != nil })
	fill := func() {
		for b.sw.Send(f) == 0 {
		}
	}
	fill()
	done := make(chan struct{})
	close(done)
	if !b.sw.AwaitRoom(g.mac, done) {
		t.Error("the port has ended")
	}
	go drainCount(g.conn, new(atomic.Int64))
	if !b.sw.AwaitRoom(g.mac, nil) {
		t.Error("the port has ended")
	}
	g.conn.Close()
	<-g.ended
	if b.sw.AwaitRoom(g.mac, nil) {
		t.Error("the port has not ended")
	}
}
