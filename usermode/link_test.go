package usermode

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/usernet/usernet/usermode/tcprelay"
)

func TestClassify(t *testing.T) {
	guest, host := guest4.Addr(), host4.Addr()
	with := func(p []byte, at int, b byte) []byte {
		p[at] = b
		return p
	}
	ip6 := func(next byte, src, dst string, payload ...byte) []byte {
		h := header.IPv6(make([]byte, header.IPv6MinimumSize))
		h.Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(payload)), HopLimit: 64,
			SrcAddr: toTCPIP(netip.MustParseAddr(src)), DstAddr: toTCPIP(netip.MustParseAddr(dst)),
		})
		h[6] = next
		return append(h, payload...)
	}
	for _, c := range []struct {
		name   string
		packet []byte
		want   bool
	}{
		{"nothing", nil, false},
		{"not IP", []byte("hello, world, what a nice day"), false},
		{"UDP", udpPacket(guest, 1, netip.AddrPortFrom(host, 2), nil), true},
		{"cut off", udpPacket(guest, 1, netip.AddrPortFrom(host, 2), nil)[:19], false},
		{"IP options", with(udpPacket(guest, 1, netip.AddrPortFrom(host, 2), nil), 0, 0x46), false},
		{"echo request", echoRequest(guest, host, 1, 1, nil), true},
		{"echo reply", with(echoRequest(guest, host, 1, 1, nil), 20, 0), false},
		{"unreachable", with(echoRequest(guest, host, 1, 1, nil), 20, 3), false},
		{"ICMP without a type", echoRequest(guest, host, 1, 1, nil)[:20], false},
		{"later fragment of ICMP", with(with(echoRequest(guest, host, 1, 1, nil), 20, 3), 7, 1), true},
		{"to a group", ip4(17, guest, netip.MustParseAddr("224.0.0.251"), nil), false},
		{"to everybody", ip4(17, guest, netip.MustParseAddr("255.255.255.255"), nil), false},
		{"to loopback", ip4(17, guest, netip.MustParseAddr("127.0.0.1"), nil), false},
		{"to nobody", ip4(17, guest, netip.MustParseAddr("0.0.0.0"), nil), false},
		{"from loopback", ip4(17, netip.MustParseAddr("127.0.0.1"), host, nil), false},
		{"from nobody", ip4(17, netip.MustParseAddr("0.0.0.0"), host, nil), false},
		{"UDP6", ip6(17, "fd00::2", "fd00::1"), true},
		{"TCP6", ip6(6, "fd00::2", "fd00::1"), true},
		{"fragment6", ip6(44, "fd00::2", "fd00::1"), true},
		{"hop-by-hop (MLD)", ip6(0, "fd00::2", "fd00::1"), false},
		{"routing header", ip6(43, "fd00::2", "fd00::1"), false},
		{"echo request6", ip6(58, "fd00::2", "fd00::1", 128, 0), true},
		{"neighbour solicitation", ip6(58, "fd00::2", "fd00::1", 135, 0), false},
		{"ICMPv6 without a type", ip6(58, "fd00::2", "fd00::1"), false},
		{"to a group6", ip6(17, "fd00::2", "ff02::fb"), false},
		{"to loopback6", ip6(17, "fd00::2", "::1"), false},
		{"from nobody6", ip6(17, "::", "fd00::1"), false},
		{"cut off6", ip6(17, "fd00::2", "fd00::1")[:39], false},
	} {
		if _, got := classify(c.packet); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// What the kernel is told about a packet that netstack sends.
func TestVirtioHdrFor(t *testing.T) {
	for _, c := range []struct {
		name    string
		gso     stack.GSO
		payload int
		want    virtioHdr
	}{
		{"complete", stack.GSO{}, 4000, virtioHdr{}},
		{"one segment", stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1460, L3HdrLen: 20}, 1460,
			virtioHdr{flags: 1, csumStart: 20, csumOffset: 16}},
		{"super-segment", stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1460, L3HdrLen: 20}, 1461,
			virtioHdr{flags: 1, csumStart: 20, csumOffset: 16, gsoType: 1, gsoSize: 1460, hdrLen: 40}},
		{"super-segment, IPv6", stack.GSO{Type: stack.GSOTCPv6, NeedsCsum: true, CsumOffset: 16, MSS: 1440, L3HdrLen: 40}, 64000,
			virtioHdr{flags: 1, csumStart: 40, csumOffset: 16, gsoType: 4, gsoSize: 1440, hdrLen: 40}},
		{"cut by netstack", stack.GSO{Type: stack.GSOGvisor, MSS: 1460}, 1460, virtioHdr{}},
	} {
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
			ReserveHeaderBytes: 40, Payload: buffer.MakeWithData(make([]byte, c.payload)),
		})
		pkt.TransportHeader().Push(20)
		pkt.NetworkHeader().Push(20)
		pkt.GSOOptions = c.gso
		if got := virtioHdrFor(pkt); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
		pkt.DecRef()
	}
}

func FuzzVirtioHeader(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, virtioHdrLen-1))
	f.Add([]byte{1, 1, 54, 0, 180, 5, 20, 0, 16, 0})
	f.Add([]byte{0, 3, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{3, 0x84, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeVirtio(b)
		switch {
		case len(b) < virtioHdrLen:
			if !errors.Is(err, errShortFrame) {
				t.Fatalf("%d bytes: %v", len(b), err)
			}
			return
		case err != nil:
			if !errors.Is(err, errNotSegment) {
				t.Fatal(err)
			}
			return
		}
		var again [virtioHdrLen]byte
		h.encode(again[:])
		if string(again[:]) != string(b[:virtioHdrLen]) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}

// FuzzFrame puts anything at all before a running netstack, and looks whether it still works.
func FuzzFrame(f *testing.F) {
	to := netip.AddrPortFrom(host4.Addr(), 9)
	src := netip.AddrPortFrom(guest4.Addr(), 1000)
	v6 := header.IPv6(make([]byte, 60))
	v6.Encode(&header.IPv6Fields{PayloadLength: 20, TransportProtocol: tcp.ProtocolNumber, HopLimit: 9,
		SrcAddr: toTCPIP(guest6.Addr()), DstAddr: toTCPIP(host6.Addr())})
	for _, p := range [][]byte{
		nil,
		udpPacket(guest4.Addr(), 1000, to, []byte("hello")),
		tcpPacket(src, to, header.TCPFlagSyn),
		tcpPacket(src, to, header.TCPFlagAck|header.TCPFlagFin),
		echoRequest(guest4.Addr(), host4.Addr(), 1, 1, []byte("hello")),
		v6,
	} {
		f.Add(append(make([]byte, virtioHdrLen), p...))
	}
	s := newTestStack(f)
	s.start(f)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > virtioHdrLen+gsoMaxSize || len(frame) == 0 { // longer ones do not come out of a TUN
			return
		}
		if _, err := s.guest.Write(frame); err != nil {
			t.Fatal(err)
		}
		// A fragment of this very request may be waiting to be put together with rubbish; hence the other address.
		mark := rand.Uint32()
		ask := binary.BigEndian.AppendUint32(nil, mark)
		s.send(t, echoRequest(netip.MustParseAddr("10.200.8.77"), host4.Addr(), uint16(mark), uint16(mark>>16), ask))
		for deadline := time.Now().Add(5 * time.Second); ; {
			p := s.next(t, time.Until(deadline))
			if p == nil {
				t.Fatalf("netstack is dead after %x", frame)
			}
			if len(p) > 28 && string(p[28:]) == string(ask) {
				return
			}
		}
	})
}

// Rubbish from a container's raw socket, through a real TUN, while others use it.
func TestGarbage(t *testing.T) {
	b := newBed(t, usual)
	to := listenTCP(t, host4.Addr(), echoTCP)
	conn := b.mustDial(t, "tcp", to)
	var raw *os.File
	err := b.container.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		raw = os.NewFile(uintptr(fd), "packet")
		tun, err := net.InterfaceByName("tun0")
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: tun.Index, Protocol: 0x0008})
	})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	r := rand.New(rand.NewChaCha8([32]byte{3}))
	seeds := [][]byte{
		udpPacket(guest4.Addr(), 1000, netip.AddrPortFrom(host4.Addr(), 9), make([]byte, 200)),
		tcpPacket(netip.AddrPortFrom(guest4.Addr(), 1000), to, header.TCPFlagSyn),
		echoRequest(guest4.Addr(), host4.Addr(), 1, 1, make([]byte, 56)),
		make([]byte, 1),
		make([]byte, 1400),
	}
	sent := 0
	for i := range 20000 {
		p := append([]byte(nil), seeds[r.IntN(len(seeds))]...)
		for range r.IntN(8) {
			p[r.IntN(len(p))] = byte(r.Uint32())
		}
		if i%5 == 4 {
			for j := range p {
				p[j] = byte(r.Uint32())
			}
		}
		if _, err := raw.Write(p); err == nil { // ENOBUFS: the queue is full
			sent++
		}
	}
	if sent < 1000 {
		t.Fatalf("only %d packets were sent", sent)
	}
	conn.Write([]byte("x"))
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Errorf("the old connection: %v", err)
	}
	if _, err := b.mustDial(t, "tcp", to).Write([]byte("x")); err != nil {
		t.Errorf("a new connection: %v", err)
	}
	echoDatagram(t, b.mustDial(t, "udp", listenUDP(t, host4.Addr())), []byte("hello"))
}

// A container that sends SYNs and never answers keeps nobody else from connecting.
func TestSYNFlood(t *testing.T) {
	s := newTestStack(t, tcprelay.Limits{Handshakes: 30, ClientHandshakes: 20, Handshake: 2 * time.Second})
	s.start(t)
	to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) { c.Read(make([]byte, 1)) })
	for port := uint16(1); port <= 100; port++ {
		s.send(t, tcpPacket(netip.AddrPortFrom(guest4.Addr(), port), to, header.TCPFlagSyn))
	}
	answered := map[uint16]bool{}
	for len(answered) < 20 {
		answered[header.TCP(s.expect(t, tcp.ProtocolNumber).Payload()).DestinationPort()] = true
	}
	s.send(t, tcpPacket(netip.AddrPortFrom(guest4.Addr().Next(), 1), to, header.TCPFlagSyn))
	for {
		p := s.expect(t, tcp.ProtocolNumber)
		h := header.TCP(p.Payload())
		if toAddr(p.DestinationAddress()) != guest4.Addr() {
			if h.Flags() != header.TCPFlagSyn|header.TCPFlagAck {
				t.Errorf("answer to the other container: %s", h.Flags())
			}
			break
		}
		answered[h.DestinationPort()] = true
	}
	if len(answered) > 20 {
		t.Errorf("%d handshakes of one container at a time, want 20", len(answered))
	}
	eventually(t, "the handshakes are given up", func() bool {
		return s.relays.Stats().Pending == 0
	})
}

// What belongs to no connection, as after a restart of the daemon, is answered with a reset: the container must not
// wait for its retransmissions to run out.
func TestUnknownConnection(t *testing.T) {
	s := newTestStack(t)
	s.start(t)
	s.send(t, tcpPacket(netip.AddrPortFrom(guest4.Addr(), 1), netip.AddrPortFrom(host4.Addr(), 80), header.TCPFlagAck|header.TCPFlagPsh))
	if h := header.TCP(s.expect(t, tcp.ProtocolNumber).Payload()); h.Flags()&header.TCPFlagRst == 0 {
		t.Errorf("answer: %s, want a reset", h.Flags())
	}
}
