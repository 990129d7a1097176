package usermode

import (
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// testStack is a carrier whose TUN is one end of a socket pair: the test sees every packet, and there is no kernel
// behind the other end that answers them.
type testStack struct {
	*carrier
	tun, guest *os.File
}

func newTestStack(t testing.TB, limits ...tcprelay.Limits) *testStack {
	t.Helper()
	routines := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, routines) })
	nettest.Host(t, host4, host6)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &testStack{tun: os.NewFile(uintptr(fds[0]), "tun"), guest: os.NewFile(uintptr(fds[1]), "guest")}
	raw, err := s.tun.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	cfg := testNetstackConfig(t, variant{mtu: 1500})
	for _, l := range limits {
		cfg.TCP = l
	}
	if s.carrier, err = newCarrier(raw, cfg); err != nil {
		t.Fatal(err)
	}
	return s
}

// start receives until the test ends or the function that it returns is called. What belongs to the receiver can be
// looked at then.
func (s *testStack) start(t testing.TB) (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.link.receive(); err != nil {
			t.Error(err)
		}
	})
	stop = func() { s.poller.stop(); wg.Wait() }
	t.Cleanup(func() {
		stop()
		s.tun.SetWriteDeadline(time.Unix(1, 0))
		s.close()
		s.tun.Close()
		s.guest.Close()
	})
	return stop
}

// send sends a packet as a container.
func (s *testStack) send(t testing.TB, packet []byte) {
	t.Helper()
	if _, err := s.guest.Write(append(make([]byte, virtioHdrLen), packet...)); err != nil {
		t.Fatal(err)
	}
}

// next returns the next packet to a container, or nil after timeout.
func (s *testStack) next(t testing.TB, timeout time.Duration) []byte {
	t.Helper()
	buf := make([]byte, virtioHdrLen+gsoMaxSize)
	s.guest.SetReadDeadline(time.Now().Add(timeout))
	n, err := s.guest.Read(buf)
	if os.IsTimeout(err) {
		return nil
	}
	if err != nil || n <= virtioHdrLen {
		t.Fatalf("read packet: %d bytes, %v", n, err)
	}
	return buf[virtioHdrLen:n]
}

// expect returns the next packet, which must be there soon, be IPv4 and carry proto.
func (s *testStack) expect(t testing.TB, proto tcpip.TransportProtocolNumber) header.IPv4 {
	t.Helper()
	p := header.IPv4(s.next(t, 5*time.Second))
	if p == nil || !p.IsValid(len(p)) || p.TransportProtocol() != proto {
		t.Fatalf("got %x, want a packet of protocol %d", []byte(p), proto)
	}
	return p
}

// eventually waits until ok, which has no event to wait for.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func toTCPIP(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// ip4 puts an IPv4 header before payload.
func ip4(proto tcpip.TransportProtocolNumber, src, dst netip.Addr, payload []byte) []byte {
	h := header.IPv4(make([]byte, header.IPv4MinimumSize))
	h.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(h) + len(payload)), TTL: 64, Protocol: uint8(proto),
		SrcAddr: toTCPIP(src), DstAddr: toTCPIP(dst),
	})
	h.SetChecksum(^h.CalculateChecksum())
	return append(h, payload...)
}

func udpPacket(src netip.Addr, port uint16, dst netip.AddrPort, payload []byte) []byte {
	h := header.UDP(make([]byte, header.UDPMinimumSize))
	h.Encode(&header.UDPFields{SrcPort: port, DstPort: dst.Port(), Length: uint16(len(h) + len(payload))}) // no checksum
	return ip4(header.UDPProtocolNumber, src, dst.Addr(), append(h, payload...))
}

func tcpPacket(src, dst netip.AddrPort, flags header.TCPFlags) []byte {
	h := header.TCP(make([]byte, header.TCPMinimumSize))
	h.Encode(&header.TCPFields{
		SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535,
	})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, toTCPIP(src.Addr()), toTCPIP(dst.Addr()), uint16(len(h)))
	h.SetChecksum(^h.CalculateChecksum(sum))
	return ip4(header.TCPProtocolNumber, src.Addr(), dst.Addr(), h)
}

func echoRequest(src, dst netip.Addr, id, seq uint16, payload []byte) []byte {
	h := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize, header.ICMPv4MinimumSize+len(payload)))
	h.SetType(header.ICMPv4Echo)
	h.SetIdent(id)
	h.SetSequence(seq)
	h.SetChecksum(header.ICMPv4Checksum(h, checksum.Checksum(payload, 0)))
	return ip4(header.ICMPv4ProtocolNumber, src, dst, append(h, payload...))
}
