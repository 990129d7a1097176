package usermode

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
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

// Rubbish in an error queue, which the kernel fills from packets of anybody, is harmless.
func FuzzHostError(f *testing.F) {
	entry := func(level, kind int32, data ...byte) []byte {
		b := make([]byte, unix.CmsgSpace(len(data)))
		binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(len(data))))
		binary.NativeEndian.PutUint32(b[8:], uint32(level))
		binary.NativeEndian.PutUint32(b[12:], uint32(kind))
		copy(b[unix.CmsgLen(0):], data)
		return b
	}
	ee := func(errno unix.Errno, origin, kind, code byte, info uint32) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(errno))
		b = append(b, origin, kind, code, 0)
		return append(binary.NativeEndian.AppendUint32(b, info), 0, 0, 0, 0)
	}
	sa4 := []byte{unix.AF_INET, 0, 0, 0, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0}
	f.Add([]byte{})
	f.Add(entry(unix.IPPROTO_IP, unix.IP_RECVERR, append(ee(unix.ECONNREFUSED, 2, 3, 3, 0), sa4...)...))
	f.Add(entry(unix.IPPROTO_IP, unix.IP_RECVERR, append(ee(unix.EMSGSIZE, 2, 3, 4, 1400), sa4...)...))
	f.Add(entry(unix.IPPROTO_IP, unix.IP_RECVERR, ee(unix.EMSGSIZE, 1, 0, 0, 1400)...))
	f.Add(entry(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, ee(unix.EMSGSIZE, 3, 2, 0, 1400)...))
	f.Fuzz(func(t *testing.T, control []byte) {
		e, ok := parseHostError(control)
		if !ok {
			return
		}
		if !e.local && !passes4(e.icmp.kind) && !passes6(e.icmp.kind) {
			t.Fatalf("%+v passes", e)
		}
		if e.icmp.from.IsValid() && isReserved(e.icmp.from) {
			t.Fatalf("%+v shows a reserved address", e)
		}
		for _, v4 := range []bool{true, false} {
			client, dst := guest6.Addr(), host6.Addr()
			if v4 {
				client, dst = guest4.Addr(), host4.Addr()
			}
			var b [virtioHdrLen + maxError6]byte
			frame := putError(b[:], e.icmp, client, dst, 1, control, control)
			if _, ok := classify(frame[virtioHdrLen:]); ok {
				t.Fatal("an ICMP error from us would be carried on")
			}
		}
	})
}
