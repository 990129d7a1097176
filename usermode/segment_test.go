package usermode

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// superSegment is a TCP packet of either family as netstack leaves it to the kernel, with the pseudo-header's sum alone.
func superSegment(v6 bool, flags header.TCPFlags, options []byte, payload []byte) []byte {
	tcp := header.TCP(make([]byte, header.TCPMinimumSize+len(options)))
	tcp.Encode(&header.TCPFields{SrcPort: 80, DstPort: 1000, SeqNum: 1<<32 - 500, AckNum: 7, DataOffset: uint8(len(tcp)), Flags: flags, WindowSize: 9})
	copy(tcp[header.TCPMinimumSize:], options)
	segment := append(tcp, payload...)
	src, dst := netip.MustParseAddr("10.200.9.1"), netip.MustParseAddr("10.200.8.2")
	if v6 {
		src, dst = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
	}
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, toTCPIP(src), toTCPIP(dst), uint16(len(segment)))
	header.TCP(segment).SetChecksum(sum)
	if !v6 {
		p := ip4(header.TCPProtocolNumber, src, dst, segment)
		header.IPv4(p).SetID(65535)
		return p
	}
	ip := header.IPv6(make([]byte, header.IPv6MinimumSize))
	ip.Encode(&header.IPv6Fields{PayloadLength: uint16(len(segment)), TransportProtocol: header.TCPProtocolNumber, HopLimit: 64,
		SrcAddr: toTCPIP(src), DstAddr: toTCPIP(dst)})
	return append(ip, segment...)
}

// checkSegment checks a complete packet's lengths and sums and returns its TCP header and payload.
func checkSegment(t *testing.T, p []byte) (header.TCP, []byte) {
	t.Helper()
	ipLen, ok := tcpOffset(p)
	if !ok {
		t.Fatalf("not TCP: %x", p)
	}
	var src, dst = header.IPv6(p).SourceAddress, header.IPv6(p).DestinationAddress
	if ipLen == header.IPv4MinimumSize {
		ip := header.IPv4(p)
		src, dst = ip.SourceAddress, ip.DestinationAddress
		if int(ip.TotalLength()) != len(p) || !ip.IsChecksumValid() {
			t.Fatalf("IPv4 header of %d bytes: %x", len(p), p[:ipLen])
		}
	} else if int(header.IPv6(p).PayloadLength()) != len(p)-ipLen {
		t.Fatalf("IPv6 header of %d bytes: %x", len(p), p[:ipLen])
	}
	tcp := header.TCP(p[ipLen:])
	payload := p[ipLen+int(tcp.DataOffset()):]
	if !tcp.IsChecksumValid(src(), dst(), checksum.Checksum(payload, 0), uint16(len(payload))) {
		t.Fatalf("TCP checksum of %x", p[:ipLen+int(tcp.DataOffset())])
	}
	return tcp, payload
}

func TestSegments(t *testing.T) {
	timestamps := []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	const finPshCwr = header.TCPFlagAck | header.TCPFlagFin | header.TCPFlagPsh | header.TCPFlagCwr
	for _, c := range []struct {
		name         string
		v6           bool
		payload, mss int
		want         []int
	}{
		{"acknowledgement", false, 0, 1448, []int{0}},
		{"one segment", false, 1448, 1448, []int{1448}},
		{"no MSS", true, 3000, 0, []int{3000}},
		{"exactly two", false, 2896, 1448, []int{1448, 1448}},
		{"two and a byte", true, 2857, 1428, []int{1428, 1428, 1}},
		{"a full one", false, gsoMaxSize - 52, 30000, []int{30000, 30000, gsoMaxSize - 52 - 60000}},
	} {
		t.Run(c.name, func(t *testing.T) {
			payload := make([]byte, c.payload)
			rand.NewChaCha8([32]byte{}).Read(payload)
			packet := superSegment(c.v6, finPshCwr, timestamps, payload)
			var got []byte
			var lengths []int
			ok := segments(packet, c.mss, func(headers, payload []byte) {
				n := len(lengths)
				lengths = append(lengths, len(payload))
				tcp, part := checkSegment(t, append(bytes.Clone(headers), payload...))
				want := header.TCPFlagAck
				if n == 0 {
					want |= header.TCPFlagCwr
				}
				if n == len(c.want)-1 {
					want |= header.TCPFlagFin | header.TCPFlagPsh
				}
				if tcp.Flags() != want {
					t.Errorf("segment %d: flags %s, want %s", n, tcp.Flags(), want)
				}
				if seq := uint32(1<<32-500) + uint32(len(got)); tcp.SequenceNumber() != seq {
					t.Errorf("segment %d: sequence number %d, want %d", n, tcp.SequenceNumber(), seq)
				}
				if id := uint16(65535 + n); !c.v6 && header.IPv4(headers).ID() != id {
					t.Errorf("segment %d: ID %d, want %d", n, header.IPv4(headers).ID(), id)
				}
				if !bytes.Equal(tcp.Options(), timestamps) {
					t.Errorf("segment %d: options %x", n, tcp.Options())
				}
				got = append(got, part...)
			})
			if !ok || !bytes.Equal(got, payload) {
				t.Errorf("%t: %d bytes in %v, want %v", ok, len(got), lengths, c.want)
			}
		})
	}
}

// Whatever is taken for a TCP packet comes out with all its payload, in segments no longer than asked for.
func FuzzSegments(f *testing.F) {
	f.Add(superSegment(false, header.TCPFlagAck, nil, make([]byte, 3000)), uint16(1460))
	f.Add(superSegment(true, header.TCPFlagAck|header.TCPFlagFin, make([]byte, 12), make([]byte, 3000)), uint16(1))
	f.Add(superSegment(false, header.TCPFlagSyn, make([]byte, 40), nil), uint16(0))
	f.Add([]byte{0x45}, uint16(9))
	f.Fuzz(func(t *testing.T, b []byte, mss uint16) {
		if len(b) > gsoMaxSize {
			return
		}
		var got []byte
		n := 0
		ok := segments(b, int(mss), func(headers, payload []byte) {
			n++
			if mss > 0 && len(payload) > int(mss) {
				t.Fatalf("segment of %d bytes, MSS %d", len(payload), mss)
			}
			checkSegment(t, append(bytes.Clone(headers), payload...))
			got = append(got, payload...)
		})
		if !ok {
			return
		}
		ipLen, _ := tcpOffset(b)
		want := b[ipLen+int(header.TCP(b[ipLen:]).DataOffset()):]
		if !bytes.Equal(got, want) || n == 0 {
			t.Fatalf("%d segments with %d bytes, want %d", n, len(got), len(want))
		}
	})
}
