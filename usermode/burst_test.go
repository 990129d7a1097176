package usermode

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// Datagrams of all lengths, without a pause between them and from several flows in turn, arrive as they were, in order.
func TestUDPBursts(t *testing.T) {
	s := newTestStack(t)
	listener, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(host4.Addr(), 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := listener.SetReadBuffer(4 << 20); err != nil {
		t.Fatal(err)
	}
	to := listener.LocalAddr().(*net.UDPAddr).AddrPort()
	sizes := []int{4, 4, 4, 100, 100, 100, 7, 100, 1400, 1400, 1400, 60, 4, 5, 6, 7, 0, 0, 1472, 8, 8}
	want := map[uint16][]int{}
	// The socket pair holds as many packets as fit its buffers before there is a receiver, so all of them are read
	// without a pause.
	for n := range 2 {
		for i, size := range sizes {
			for _, port := range []uint16{1000, 1000, 1001}[:1+i%3] {
				payload := make([]byte, size)
				if size >= 4 {
					binary.BigEndian.PutUint32(payload, uint32(n<<16|i))
				}
				s.send(t, udpPacket(guest4.Addr(), port, to, payload))
				want[port] = append(want[port], size)
			}
		}
	}
	s.start(t)
	flows := map[netip.AddrPort][]int{} // by the host's ports
	listener.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, maxDatagram)
	for range len(want[1000]) + len(want[1001]) {
		n, from, err := listener.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatalf("%v after %v", err, flows)
		}
		i := len(flows[from])
		flows[from] = append(flows[from], n)
		if n >= 4 && sizes[binary.BigEndian.Uint32(buf)&0xffff] != n {
			t.Errorf("datagram %d has %d bytes and the payload of another", i, n)
		}
	}
	if len(flows) != 2 {
		t.Fatalf("%d flows, want 2", len(flows))
	}
	for from, got := range flows {
		w := want[1000]
		if len(got) == len(want[1001]) {
			w = want[1001]
		}
		if string(bytesOf(got)) != string(bytesOf(w)) {
			t.Errorf("from %s: lengths %v, want %v", from, got, w)
		}
	}
}

func bytesOf(lengths []int) []byte {
	var b []byte
	for _, n := range lengths {
		b = binary.BigEndian.AppendUint16(b, uint16(n))
	}
	return b
}

// A burst to a closed port is answered as a single datagram is.
func TestUDPBurstRefused(t *testing.T) {
	s := newTestStack(t)
	closed := netip.AddrPortFrom(host4.Addr(), 9)
	for range 20 {
		s.send(t, udpPacket(guest4.Addr(), 1000, closed, make([]byte, 100)))
	}
	s.start(t)
	e := s.expect(t, header.ICMPv4ProtocolNumber)
	if m := header.ICMPv4(e.Payload()); m.Type() != header.ICMPv4DstUnreachable || m.Code() != header.ICMPv4PortUnreachable {
		t.Errorf("ICMP %d/%d, want port unreachable", m.Type(), m.Code())
	}
	if src := header.UDP(e.Payload()[icmpHdrLen+ipv4HdrLen:]).SourcePort(); src != 1000 {
		t.Errorf("the error quotes a packet from port %d", src)
	}
}

// The kernel takes no burst of datagrams that are longer than the way is wide. One by one, they are refused if they must
// not be cut, and arrive if they may.
func TestUDPBurstTooBig(t *testing.T) {
	s := newTestStack(t)
	far := nettest.World(t)
	here, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	var to *net.UDPConn
	err = far.Do(func() (err error) {
		to, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(nettest.Far4, 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	at := to.LocalAddr().(*net.UDPAddr).AddrPort()
	// The host's kernel is to know how wide the way is.
	p := newProber(t, here, unix.SOCK_DGRAM, 0, at, 64, true)
	unix.Write(p.fd, make([]byte, nettest.Narrow))
	p.next(t)

	const n = 10
	for range n {
		packet := udpPacket(guest4.Addr(), 1000, at, make([]byte, nettest.Narrow))
		h := header.IPv4(packet)
		h.SetFlagsFragmentOffset(header.IPv4FlagDontFragment, 0)
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		s.send(t, packet)
	}
	for range n {
		s.send(t, udpPacket(guest4.Addr(), 1001, at, make([]byte, nettest.Narrow)))
	}
	s.start(t)
	for range n {
		e := s.expect(t, header.ICMPv4ProtocolNumber)
		if m := header.ICMPv4(e.Payload()); m.Code() != header.ICMPv4FragmentationNeeded || m.MTU() != nettest.Narrow {
			t.Errorf("ICMP %d/%d, MTU %d; want fragmentation needed, MTU %d", m.Type(), m.Code(), m.MTU(), nettest.Narrow)
		}
	}
	to.SetReadDeadline(time.Now().Add(5 * time.Second))
	for range n {
		if got, _, err := to.ReadFrom(make([]byte, maxDatagram)); got != nettest.Narrow || err != nil {
			t.Fatalf("received %d bytes, %v, want %d", got, err, nettest.Narrow)
		}
	}
}
