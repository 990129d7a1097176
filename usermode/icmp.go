package usermode

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/usermode/tcprelay"
)

const (
	// Echo requests without an answer yet, and how long one may take.
	maxEchoes       = 4096
	maxClientEchoes = 512
	echoTimeout     = 15 * time.Second
)

// echoRelay carries ICMP echo on: a container's request is sent to its destination by a socket of the host, and the
// reply or the error that comes of it, if any does, is sent on to the container. Two sockets serve everybody; they are
// opened when they are first needed, since not every process may have them. All of it belongs to the goroutine that
// receives from the TUN.
type echoRelay struct {
	*exit
	pending  *tcprelay.Quota
	patience time.Duration // echoTimeout
	v4, v6   echoSocket
	refused  atomic.Uint64 // requests that were not sent
}

// echo is a request that was sent.
type echo struct {
	client, dialled netip.Addr
	id, seq         uint16     // the container's
	host            netip.Addr // whom it was sent to
	sent            time.Time
}

func newEchoRelay(x *exit) *echoRelay {
	r := &echoRelay{exit: x, pending: tcprelay.NewQuota(maxEchoes, maxClientEchoes), patience: echoTimeout}
	r.v4 = echoSocket{relay: r, v4: true, fd: -1, open: make(map[uint16]echo)}
	r.v6 = echoSocket{relay: r, fd: -1, open: make(map[uint16]echo)}
	return r
}

// close closes the sockets.
func (r *echoRelay) close() {
	r.v4.close()
	r.v6.close()
}

// take takes a frame from the TUN if it is an echo request.
func (r *echoRelay) take(f *frame) bool {
	var d datagram
	switch d.decodeEcho(f) {
	case good:
		r.forward(&d)
	case broken:
		r.refused.Add(1)
	default:
		return false
	}
	return true
}

// handle takes an ICMP message that netstack has put together from fragments. It always reports it as dealt with:
// netstack would answer an echo request by itself, for any address.
func (r *echoRelay) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	v4 := pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber
	h := pkt.TransportHeader().Slice()
	if len(h) < icmpHdrLen || h[0] != requestType(v4) || h[1] != 0 {
		return true
	}
	// netstack has verified version 6 only.
	if v4 && checksum.Checksum(h, pkt.Data().Checksum()) != 0xffff {
		return true
	}
	d := datagram{
		client:  netip.AddrPortFrom(toAddr(id.RemoteAddress), 0),
		dst:     netip.AddrPortFrom(toAddr(id.LocalAddress), 0),
		hops:    hopsOf(pkt),
		header:  append(append([]byte(nil), pkt.NetworkHeader().Slice()...), h...),
		payload: [2][]byte{pkt.Data().AsRange().ToSlice(), nil},
	}
	r.forward(&d)
	return true
}

// forward sends an echo request to its destination.
func (r *echoRelay) forward(d *datagram) {
	s := &r.v6
	if d.dst.Addr().Is4() {
		s = &r.v4
	}
	host, ok := r.cfg.Resolve(d.dst.Addr())
	if !ok || host.Is4() != s.v4 {
		r.refused.Add(1)
		r.report(icmperror.Prohibited(s.v4), d.client.Addr(), d.dst.Addr(), d.header, d.payload[0])
		return
	}
	if !s.available() {
		r.refused.Add(1)
		return
	}
	h := d.header[len(d.header)-icmpHdrLen:]
	e := echo{
		client: d.client.Addr(), dialled: d.dst.Addr(), host: host, sent: time.Now(),
		id: binary.BigEndian.Uint16(h[4:]), seq: binary.BigEndian.Uint16(h[6:]),
	}
	seq, ok := s.register(e)
	if !ok {
		r.refused.Add(1)
		return
	}
	if !s.send(d, seq, host) {
		r.refused.Add(1)
		s.forget(seq, e)
	}
}

// Both versions have the same message under different types.
func requestType(v4 bool) byte {
	if v4 {
		return byte(header.ICMPv4Echo)
	}
	return byte(header.ICMPv6EchoRequest)
}

func replyType(v4 bool) byte {
	if v4 {
		return byte(header.ICMPv4EchoReply)
	}
	return byte(header.ICMPv6EchoReply)
}

// deliver sends a reply to the container that asked. The message is where putICMP wants it.
func (r *echoRelay) deliver(e echo, b []byte) {
	m := header.ICMPv4(b[icmpRoom:])
	m.SetIdent(e.id)
	m.SetSequence(e.seq)
	if frame := putICMP(b, e.dialled, e.client, r.nextID()); r.fits(frame) {
		r.inject(frame)
		return
	}
	src, dst := tcpip.AddrFromSlice(e.dialled.AsSlice()), tcpip.AddrFromSlice(e.client.AsSlice())
	route, err := r.stack.FindRoute(nicID, src, dst, protocolOf(dst), false)
	if err != nil {
		r.lost.Add(1)
		return
	}
	defer route.Release()
	sendCut(route, m)
}

// sendCut sends a complete ICMP message along route, in fragments, which netstack makes.
func sendCut(route *stack.Route, message []byte) {
	v := buffer.NewView(len(message))
	v.Write(message[icmpHdrLen:])
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: icmpHdrLen + int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithView(v),
	})
	defer pkt.DecRef()
	copy(pkt.TransportHeader().Push(icmpHdrLen), message)
	pkt.TransportProtocolNumber = header.ICMPv6ProtocolNumber
	if route.NetProto() == header.IPv4ProtocolNumber {
		pkt.TransportProtocolNumber = header.ICMPv4ProtocolNumber
	}
	route.WritePacket(stack.NetworkHeaderParams{Protocol: pkt.TransportProtocolNumber, TTL: hopsOut}, pkt)
}
