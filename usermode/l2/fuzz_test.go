//go:build unix

package l2

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sink is where the frames of a port go that does not run.
type sink struct{ wire []byte }

func (s *sink) try(b []byte) (int, error) {
	s.wire = append(s.wire, b...)
	return len(b), nil
}
func (*sink) write([]byte) error          { return nil }
func (*sink) SetDeadline(time.Time) error { return nil }
func (*sink) Close() error                { return nil }

// checker is a gateway that holds what it gets against what it is promised.
type checker struct{ t *testing.T }

func (c checker) Deliver(_ *Port, frames []Frame) {
	for i := range frames {
		f := &frames[i]
		if f.Len() < headerLen || f.check() != nil || f.src().group() || f.src() == gatewayMAC || f.dst() != gatewayMAC && !f.dst().group() {
			c.t.Errorf("the gateway gets %x, %+v", f.appendTo(nil), f.Virtio)
		}
	}
}

// FuzzSwitch has a guest send anything: what another one gets is frames, not from the gateway's or its own address, and nothing that is
// the gateway's to say.
func FuzzSwitch(f *testing.F) {
	for _, dst := range []MAC{guestMAC(2), guestMAC(3), gatewayMAC, broadcast} {
		good := Frame{Head: frame(dst, guestMAC(1), 60, 0)}
		f.Add(appendFrame(nil, Usernet, 0, &good))
	}
	long := segment(false, false, 5000, 1000)
	copy(long.Head, broadcast[:])
	arp := Frame{Head: slices.Concat(broadcast[:], make([]byte, 6), []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 2}, make([]byte, 6), []byte{192, 168, 127, 1}, make([]byte, 10))}
	na := Frame{Head: slices.Concat(broadcast[:], make([]byte, 6), []byte{0x81, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, protoICMPv6, 255}, make([]byte, 32), []byte{icmp6NeighbourAdvertisement}, make([]byte, 23))}
	for _, fr := range []Frame{long, arp, na} {
		fr.Head[6] = 2
		f.Add(appendFrame(nil, Usernet, AllOffload, &fr))
	}
	guarded := []netip.Addr{netip.MustParseAddr("192.168.127.1"), netip.MustParseAddr("fd00::1")}
	f.Fuzz(func(t *testing.T, b []byte) {
		sw := NewSwitch(Config{GatewayMAC: gatewayMAC, Gateway: checker{t}, GatewayAddrs: guarded, MACsPerPort: 4})
		heard := &sink{}
		var ports []*Port
		for _, takes := range []Offload{AllOffload, 0} {
			p := sw.NewPort(newLink(heard, Options{Framing: Usernet, Takes: takes, MTU: 9000}, nil, heard), PortConfig{})
			p.began = sw.now()
			if err := sw.add(p); err != nil {
				t.Fatal(err)
			}
			ports = append(ports, p)
		}
		from, other := ports[0], ports[1]
		if !other.mayUse(guestMAC(2)) {
			t.Fatal("an address is somebody's")
		}
		s := splitter{framing: Usernet}
		frames, _, _ := s.split(b, make([]Frame, 0, 16))
		sw.carry(from, frames)
		if sw.PortOf(guestMAC(2)) != other {
			t.Error("an address is taken by a port that was there before")
		}
		if n := len(sw.Table()); n > 1+4 {
			t.Errorf("%d addresses", n)
		}
		all := splitter{framing: Usernet}
		for wire := heard.wire; len(wire) > 0; {
			got, used, err := all.split(wire, make([]Frame, 0, 64))
			if err != nil || used == 0 || all.dropped > 0 {
				t.Fatalf("%d bytes are no frames: %v", len(wire), err)
			}
			for i := range got {
				g := &got[i]
				if src := g.src(); src.group() || src == gatewayMAC || src == guestMAC(2) || sw.guard.stops(g) || g.Virtio.Flags&^DataValid != 0 || g.Virtio.GSOType != GSONone {
					t.Errorf("a guest gets %x", g.appendTo(nil))
				}
			}
			wire = wire[used:]
		}
	})
}

// FuzzPackets sends a packet of any kind, and then one that is a frame.
func FuzzPackets(f *testing.F) {
	f.Add([]byte("short"))
	f.Add(frame(guestMAC(1), guestMAC(2), 60, 1))
	f.Add(make([]byte, 3000))
	var links []*Link
	var guests []interface{ Write([]byte) (int, error) }
	for _, typ := range []int{unix.SOCK_DGRAM, unix.SOCK_SEQPACKET} {
		host, guest := socketpair(f, typ)
		l, err := Packets(host, Options{MTU: 1500})
		if err != nil {
			f.Fatal(err)
		}
		links, guests = append(links, l), append(guests, guest)
	}
	last := frame(guestMAC(9), guestMAC(8), 77, 0xfefefefe)
	f.Fuzz(func(t *testing.T, b []byte) {
		for i, l := range links {
			if _, err := guests[i].Write(b); err != nil {
				continue // longer than the socket's buffer
			}
			if _, err := guests[i].Write(last); err != nil {
				t.Fatal(err)
			}
			for done := false; !done; {
				frames, err := l.Receive()
				if err != nil {
					t.Fatal(err)
				}
				for k := range frames {
					got := frames[k].appendTo(nil)
					if done = bytes.Equal(got, last); !done && !bytes.Equal(got, b) || len(got) < headerLen || len(got) > 2048 {
						t.Errorf("%d bytes became %d", len(b), len(got))
					}
				}
			}
		}
	})
}
