package usermode

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/icmperror"
)

// frameWith is a packet as the receiver hands it over.
func frameWith(virtio virtioHdr, packet []byte) *frame {
	f := &frame{virtio: virtio}
	f.proto, _ = classify(packet)
	f.parts[0] = packet[:min(len(packet), headSize)]
	f.parts[1] = packet[len(f.parts[0]):]
	return f
}

// udp6Packet is udpPacket for IPv6, with a checksum.
func udp6Packet(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, headroom+len(payload))
	copy(b[headroom:], payload)
	return putUDP(b, src, dst, 0, false)[virtioHdrLen:]
}

func TestDecodeUDP(t *testing.T) {
	guest, to := guest4.Addr(), netip.AddrPortFrom(host4.Addr(), 53)
	from6, to6 := netip.AddrPortFrom(guest6.Addr(), 7), netip.AddrPortFrom(host6.Addr(), 53)
	v4 := func(payload string) []byte { return udpPacket(guest, 7, to, []byte(payload)) }
	v6 := func(payload string) []byte { return udp6Packet(from6, to6, []byte(payload)) }
	summed := func(payload string) []byte {
		return udp6Packet(netip.AddrPortFrom(guest, 7), to, []byte(payload))
	}
	// with changes a byte, and makes the IP header's checksum fit again.
	with := func(p []byte, at int, b byte) []byte {
		p[at] = b
		if h := header.IPv4(p); at < ipv4HdrLen && p[0]>>4 == 4 {
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
		}
		return p
	}
	partial := virtioHdr{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: ipv4HdrLen, csumOffset: udpChecksum}
	elsewhere := partial
	elsewhere.csumOffset = 16
	for _, c := range []struct {
		name    string
		virtio  virtioHdr
		packet  []byte
		want    verdict
		payload string
	}{
		{"no checksum", virtioHdr{}, v4("hello"), good, "hello"},
		{"empty", virtioHdr{}, v4(""), good, ""},
		{"checksum", virtioHdr{}, summed("hello"), good, "hello"},
		{"wrong checksum", virtioHdr{}, with(summed("hello"), 29, 'u'), broken, ""},
		{"partial checksum", partial, with(summed("hello"), 29, 'u'), good, "hullo"},
		{"partial checksum of something else", elsewhere, summed("hello"), broken, ""},
		{"verified", virtioHdr{flags: unix.VIRTIO_NET_HDR_F_DATA_VALID}, with(summed("hello"), 29, 'u'), good, "hullo"},
		{"padding", virtioHdr{}, append(v4("hello"), 0, 0, 0), good, "hello"},
		{"UDP shorter than IP", virtioHdr{}, with(v4("hello"), 25, 10), good, "he"},
		{"UDP longer than IP", virtioHdr{}, with(v4("hello"), 25, 14), foreign, ""},
		{"UDP shorter than its header", virtioHdr{}, with(v4("hello"), 25, 7), foreign, ""},
		{"IP longer than the packet", virtioHdr{}, with(v4("hello"), 3, 34), foreign, ""},
		{"IP too short for UDP", virtioHdr{}, with(v4("hello"), 3, 27), foreign, ""},
		{"IP shorter than its header", virtioHdr{}, with(v4("hello"), 3, 19), foreign, ""},
		{"bad IP checksum", virtioHdr{}, func() []byte { p := v4("hello"); p[8]--; return p }(), foreign, ""},
		{"first fragment", virtioHdr{}, with(v4("hello"), 6, 0x20), foreign, ""},
		{"later fragment", virtioHdr{}, with(v4("hello"), 7, 1), foreign, ""},
		{"segmentation", virtioHdr{gsoType: unix.VIRTIO_NET_HDR_GSO_TCPV4}, v4("hello"), foreign, ""},
		{"TCP", virtioHdr{}, tcpPacket(netip.AddrPortFrom(guest, 7), to, header.TCPFlagSyn), foreign, ""},
		{"from no port", virtioHdr{}, with(v4("hello"), 21, 0), broken, ""},
		{"to no port", virtioHdr{}, with(v4("hello"), 23, 0), broken, ""},
		{"IPv6", virtioHdr{}, v6("hello"), good, "hello"},
		{"IPv6, wrong checksum", virtioHdr{}, with(v6("hello"), 49, 'u'), broken, ""},
		{"IPv6, no checksum", virtioHdr{}, with(with(v6("hello"), 46, 0), 47, 0), broken, ""},
		{"IPv6, fragment", virtioHdr{}, with(v6("hello"), 6, unix.IPPROTO_FRAGMENT), foreign, ""},
		{"IPv6, longer than the packet", virtioHdr{}, with(v6("hello"), 5, 14), foreign, ""},
		{"long", virtioHdr{}, v4(string(make([]byte, 5000))), good, string(make([]byte, 5000))},
		{"long, checksum", virtioHdr{}, v6(string(make([]byte, 5001))), good, string(make([]byte, 5001))},
	} {
		t.Run(c.name, func(t *testing.T) {
			var d datagram
			if got := d.decodeUDP(frameWith(c.virtio, c.packet)); got != c.want {
				t.Fatalf("verdict %d, want %d", got, c.want)
			}
			if c.want != good {
				return
			}
			if got := string(d.payload[0]) + string(d.payload[1]); got != c.payload {
				t.Errorf("payload %q, want %q", got, c.payload)
			}
			if d.client.Port() != 7 || d.dst.Port() != 53 || d.hops == 0 {
				t.Errorf("%+v", d)
			}
		})
	}
}

// Whatever comes, what is decoded lies within the packet, and is what netstack's parsers see.
func FuzzDatagram(f *testing.F) {
	to := netip.AddrPortFrom(host4.Addr(), 53)
	for _, p := range [][]byte{
		{},
		udpPacket(guest4.Addr(), 7, to, []byte("hello")),
		udp6Packet(netip.AddrPortFrom(guest6.Addr(), 7), netip.AddrPortFrom(host6.Addr(), 53), []byte("hello")),
		echoRequest(guest4.Addr(), host4.Addr(), 1, 1, []byte("hello")),
		udpPacket(guest4.Addr(), 7, to, make([]byte, 3000)),
	} {
		f.Add(uint8(0), uint16(20), p)
		f.Add(uint8(1), uint16(20), p)
		f.Add(uint8(2), uint16(40), p)
	}
	f.Fuzz(func(t *testing.T, flags uint8, start uint16, packet []byte) {
		if _, ok := classify(packet); !ok {
			return
		}
		frame := frameWith(virtioHdr{flags: flags, csumStart: start, csumOffset: udpChecksum}, packet)
		var d datagram
		proto := tcpip.TransportProtocolNumber(header.UDPProtocolNumber)
		if d.decodeUDP(frame) != good {
			d = datagram{}
			if d.decodeEcho(frame) != good {
				return
			}
			proto = header.ICMPv4ProtocolNumber
		}
		if d.size()+len(d.header) > len(packet) || len(d.header) < ipv4HdrLen+transportHdrLen {
			t.Fatalf("%d bytes of payload and %d of header in %d", d.size(), len(d.header), len(packet))
		}
		if frame.proto == header.IPv4ProtocolNumber {
			h := header.IPv4(packet)
			if !h.IsValid(len(packet)) || h.TransportProtocol() != proto || h.More() || toAddr(h.DestinationAddress()) != d.dst.Addr() {
				t.Fatalf("%+v of %x", d, packet)
			}
		} else if toAddr(header.IPv6(packet).SourceAddress()) != d.client.Addr() {
			t.Fatalf("%+v of %x", d, packet)
		}
	})
}

// An error of whatever the kernel may have put into a socket's queue is one that we take for nothing else, and comes from nobody whom a
// container must not be shown.
func FuzzPutError(f *testing.F) {
	f.Add([]byte{192, 0, 2, 1}, byte(3), byte(4), uint32(1400), []byte("quoted"))
	f.Add([]byte{127, 0, 0, 1}, byte(3), byte(3), uint32(0), []byte{})
	f.Add(netip.IPv6Loopback().AsSlice(), byte(2), byte(0), uint32(1280), []byte{})
	f.Add([]byte{}, byte(11), byte(0), uint32(0), []byte("quoted"))
	f.Fuzz(func(t *testing.T, from []byte, kind, code byte, mtu uint32, quoted []byte) {
		e := icmperror.Message{Type: kind, Code: code, MTU: mtu}
		e.From, _ = netip.AddrFromSlice(from)
		for _, v4 := range []bool{true, false} {
			if !icmperror.Passes(v4, kind) {
				continue
			}
			client, dst := guest6.Addr(), host6.Addr()
			if v4 {
				client, dst = guest4.Addr(), host4.Addr()
			}
			var b [virtioHdrLen + maxError6]byte
			packet := putError(b[:], e, client, dst, 1, quoted, quoted)[virtioHdrLen:]
			if _, ok := classify(packet); ok {
				t.Fatal("an ICMP error from us would be carried on")
			}
			src := toAddr(header.IPv6(packet).SourceAddress())
			if v4 {
				src = toAddr(header.IPv4(packet).SourceAddress())
			}
			if isReserved(src) || src != dst && src != e.From {
				t.Fatalf("%+v comes from %s", e, src)
			}
		}
	})
}
