package usermode

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// synPacket is a SYN as a container's kernel sends it, with payload behind it and its checksum wrong unless completed.
func synPacket(from, to netip.AddrPort, payload int) []byte {
	size := header.IPv6MinimumSize
	if from.Addr().Is4() {
		size = header.IPv4MinimumSize
	}
	b := make([]byte, size+header.TCPMinimumSize+4+payload)
	src, dst := tcpip.AddrFromSlice(from.Addr().AsSlice()), tcpip.AddrFromSlice(to.Addr().AsSlice())
	if from.Addr().Is4() {
		h := header.IPv4(b)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 63, Protocol: uint8(header.TCPProtocolNumber), SrcAddr: src, DstAddr: dst})
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(b) - size), TransportProtocol: header.TCPProtocolNumber, HopLimit: 63, SrcAddr: src, DstAddr: dst,
		})
	}
	header.TCP(b[size:]).Encode(&header.TCPFields{
		SrcPort: from.Port(), DstPort: to.Port(), SeqNum: 0xfffffffe, DataOffset: header.TCPMinimumSize + 4,
		Flags: header.TCPFlagSyn, WindowSize: 65535, Checksum: 0x1234,
	})
	return b
}

func frameOf(b []byte) *frame {
	proto, _ := classify(b)
	f := &frame{proto: proto, virtio: virtioHdr{flags: 1}}
	f.parts[0] = b
	return f
}

var synRoutes = []route{
	{netip.MustParseAddrPort("10.200.1.2:40000"), netip.MustParseAddrPort("192.0.2.1:80")},
	{netip.MustParseAddrPort("[fd00:200:1::2]:40000"), netip.MustParseAddrPort("[2001:db8::1]:443")},
}

func checksumOK(t *testing.T, packet []byte) {
	t.Helper()
	size, src, dst := header.IPv6MinimumSize, header.IPv6(packet).SourceAddress, header.IPv6(packet).DestinationAddress
	if packet[0]>>4 == 4 {
		size, src, dst = header.IPv4MinimumSize, header.IPv4(packet).SourceAddress, header.IPv4(packet).DestinationAddress
		if !header.IPv4(packet).IsChecksumValid() {
			t.Error("the IP header's checksum is wrong")
		}
	}
	h := header.TCP(packet[size:])
	payload := h[h.DataOffset():]
	sum := uint16(0)
	for i := 0; i < len(payload); i++ { // of zeros
		sum += uint16(payload[i])
	}
	if !h.IsChecksumValid(src(), dst(), sum, uint16(len(payload))) {
		t.Error("the TCP checksum is wrong")
	}
}

func TestSYNAndItsReset(t *testing.T) {
	for _, r := range synRoutes {
		for _, payload := range []int{0, 101} {
			b := synPacket(r.client, r.destination, payload)
			s, ok := parseSYN(frameOf(append(b, make([]byte, 3)...))) // with padding
			if !ok || s.route != r {
				t.Fatalf("parsed %v, %v, want %v", s.route, ok, r)
			}
			sent := s.frame()[virtioHdrLen:]
			if len(sent) != len(b) {
				t.Errorf("%d bytes go back into the fabric, want %d", len(sent), len(b))
			}
			checksumOK(t, sent)
			answer := s.reset()[virtioHdrLen:]
			checksumOK(t, answer)
			h := header.TCP(answer[len(answer)-header.TCPMinimumSize:])
			if want := uint32(payload) - 1; h.AckNumber() != want || h.Flags() != header.TCPFlagRst|header.TCPFlagAck {
				t.Errorf("reset %v acknowledges %d, want %d", h.Flags(), h.AckNumber(), want)
			}
			if h.SourcePort() != r.destination.Port() || h.DestinationPort() != r.client.Port() {
				t.Errorf("reset from port %d to %d", h.SourcePort(), h.DestinationPort())
			}
		}
	}
}

func TestNotSYNs(t *testing.T) {
	for _, r := range synRoutes {
		good := synPacket(r.client, r.destination, 0)
		tcp := len(good) - header.TCPMinimumSize - 4
		for name, change := range map[string]func(b []byte) []byte{
			"SYN-ACK":        func(b []byte) []byte { b[tcp+header.TCPFlagsOffset] |= byte(header.TCPFlagAck); return b },
			"RST":            func(b []byte) []byte { b[tcp+header.TCPFlagsOffset] |= byte(header.TCPFlagRst); return b },
			"no SYN":         func(b []byte) []byte { b[tcp+header.TCPFlagsOffset] = 0; return b },
			"short":          func(b []byte) []byte { return b[:tcp+10] },
			"options beyond": func(b []byte) []byte { b[tcp+header.TCPDataOffset] = 0xf0; return b },
			"no options":     func(b []byte) []byte { b[tcp+header.TCPDataOffset] = 0x40; return b },
			"port 0":         func(b []byte) []byte { b[tcp], b[tcp+1] = 0, 0; return b },
			"UDP": func(b []byte) []byte {
				if r.client.Addr().Is4() {
					b[9] = 17
				} else {
					b[6] = 17
				}
				return b
			},
			"length": func(b []byte) []byte {
				if r.client.Addr().Is4() {
					b[2] = 0xff
				} else {
					b[4] = 0xff
				}
				return b
			},
		} {
			if _, ok := parseSYN(frameOf(change(append([]byte(nil), good...)))); ok {
				t.Errorf("%s: %s was taken for a SYN", r.client, name)
			}
		}
	}
	fragment := synPacket(synRoutes[0].client, synRoutes[0].destination, 0)
	header.IPv4(fragment).SetFlagsFragmentOffset(header.IPv4FlagMoreFragments, 0)
	if _, ok := parseSYN(frameOf(fragment)); ok {
		t.Error("a fragment was taken for a SYN")
	}
}

func FuzzParseSYN(f *testing.F) {
	for _, r := range synRoutes {
		f.Add(synPacket(r.client, r.destination, 7))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > headSize {
			return
		}
		if _, ok := classify(b); !ok {
			return
		}
		if s, ok := parseSYN(frameOf(b)); ok {
			s.frame()
			s.reset()
		}
	})
}
