//go:build !race

package usermode

import (
	"net/netip"
	"testing"
	"time"
)

// Under the race detector sync.Pool drops items on purpose, hence the build tag.
func TestSteadyStateDoesNotAllocate(t *testing.T) {
	s := newTestStack(t)
	s.start(t)
	from6, to6 := netip.AddrPortFrom(guest6.Addr(), 7), listenUDP(t, host6.Addr())
	for name, packet := range map[string][]byte{
		"UDP":      udpPacket(guest4.Addr(), 7, listenUDP(t, host4.Addr()), make([]byte, 1200)),
		"UDP long": udpPacket(guest4.Addr(), 8, listenUDP(t, host4.Addr()), make([]byte, 1472)),
		"UDP6":     udp6Packet(from6, to6, make([]byte, 1200)),
		"echo":     echoRequest(guest4.Addr(), host4.Addr(), 1, 1, make([]byte, 56)),
	} {
		frame := append(make([]byte, virtioHdrLen), packet...)
		answer := make([]byte, virtioHdrLen+gsoMaxSize)
		exchange := func() {
			s.guest.Write(frame)
			s.guest.Read(answer)
		}
		s.guest.SetReadDeadline(time.Now().Add(30 * time.Second))
		exchange()
		if n := testing.AllocsPerRun(1000, exchange); n > 0 {
			t.Errorf("%s: %v allocations for each exchange, want none", name, n)
		}
	}
}
