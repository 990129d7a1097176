package usermode

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// Echo requests without an answer yet, and how long one may take.
	maxEchoes       = 4096
	maxClientEchoes = 512
	echoTimeout     = 15 * time.Second

	echoBuffer = 4 << 20
)

// echoRelay carries ICMP echo on: a container's request is sent to its destination by a socket of the host, and the
// reply, if there is one, is sent on to the container. Two sockets serve everybody; they are opened when they are
// first needed, since not every process may have them.
type echoRelay struct {
	cfg     netstackConfig
	stack   *stack.Stack
	pending *quota
	v4, v6  echoSocket
	joined  sync.WaitGroup
}

// echo is a request that was sent.
type echo struct {
	client, dialled tcpip.Address
	id, seq         uint16     // the container's
	host            netip.Addr // whom it was sent to
	sent            time.Time
}

// echoSocket sends the requests of one IP version. All have the same identifier; the sequence number tells them apart.
type echoSocket struct {
	relay *echoRelay
	v6    bool

	opened bool // or tried to
	conn   net.PacketConn
	raw    syscall.RawConn
	ident  uint16

	mu    sync.Mutex
	next  uint16
	swept time.Time
	open  map[uint16]echo
}

func newEchoRelay(st *stack.Stack, cfg netstackConfig) *echoRelay {
	r := &echoRelay{cfg: cfg, stack: st, pending: newQuota(maxEchoes, maxClientEchoes)}
	r.v4 = echoSocket{relay: r, open: make(map[uint16]echo)}
	r.v6 = echoSocket{relay: r, v6: true, open: make(map[uint16]echo)}
	return r
}

// close closes the sockets and joins their readers. It must not be called at the same time as handle.
func (r *echoRelay) close() {
	for _, s := range []*echoSocket{&r.v4, &r.v6} {
		if s.conn != nil {
			s.conn.Close()
		}
	}
	r.joined.Wait()
}

// handle takes an ICMP message from a container. It always reports it as dealt with: netstack would answer an echo
// request by itself, for any address.
func (r *echoRelay) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	s := &r.v4
	if pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		s = &r.v6
	}
	h := pkt.TransportHeader().Slice()
	if len(h) < header.ICMPv4MinimumSize || h[0] != s.request() || h[1] != 0 {
		return true
	}
	// netstack has verified version 6 only.
	if !s.v6 && checksum.Checksum(h, pkt.Data().Checksum()) != 0xffff {
		return true
	}
	host, ok := r.cfg.Resolve(toAddr(id.LocalAddress))
	if !ok || host.Is4() == s.v6 || !s.ready() {
		return true
	}
	message := make([]byte, 0, len(h)+pkt.Data().Size())
	message = append(append(message, h...), pkt.Data().AsRange().ToSlice()...)
	e := echo{
		client: id.RemoteAddress, dialled: id.LocalAddress, host: host, sent: time.Now(),
		id: header.ICMPv4(h).Ident(), seq: header.ICMPv4(h).Sequence(), // both versions have them in the same place
	}
	if seq, ok := s.register(e); ok && s.send(message, seq, host) != nil {
		s.mu.Lock()
		s.forgetLocked(seq, e)
		s.mu.Unlock()
	}
	return true
}

func (s *echoSocket) request() byte {
	if s.v6 {
		return byte(header.ICMPv6EchoRequest)
	}
	return byte(header.ICMPv4Echo)
}

func (s *echoSocket) reply() byte {
	if s.v6 {
		return byte(header.ICMPv6EchoReply)
	}
	return byte(header.ICMPv4EchoReply)
}

// ready opens the socket when it is first used, and tells whether there is one.
func (s *echoSocket) ready() bool {
	if s.opened {
		return s.conn != nil
	}
	s.opened = true
	if err := s.dial(); err != nil {
		s.relay.cfg.Log.Warn("containers cannot ping (see net.ipv4.ping_group_range)", "ipv6", s.v6, "err", err)
		return false
	}
	s.relay.joined.Go(s.receive)
	return true
}

// dial opens a ping socket (net.ipv4.ping_group_range says who may), or a raw one (CAP_NET_RAW).
func (s *echoSocket) dial() error {
	domain, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var any unix.Sockaddr = &unix.SockaddrInet4{}
	if s.v6 {
		domain, proto, any = unix.AF_INET6, unix.IPPROTO_ICMPV6, &unix.SockaddrInet6{}
	}
	const flags = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	s.ident = uint16(rand.Uint32())
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|flags, proto)
	if err == nil {
		// Bound to no port in particular, the kernel chooses one: it is the identifier in our requests.
		if err = unix.Bind(fd, any); err == nil {
			s.ident, err = boundPort(fd)
		}
	} else if fd, err = unix.Socket(domain, unix.SOCK_RAW|flags, proto); err == nil {
		err = s.filter(fd)
	}
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("open ICMP socket: %w", err)
	}
	// Requests to neighbours that are not there stay in the buffer for three seconds, and others must fit beside them.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, echoBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, echoBuffer)
	}
	f := os.NewFile(uintptr(fd), "icmp")
	defer f.Close()
	if s.conn, err = net.FilePacketConn(f); err != nil {
		return err
	}
	s.raw, err = s.conn.(syscall.Conn).SyscallConn()
	return err
}

// filter makes a raw socket receive echo replies only; it would get every ICMP message of the host.
func (s *echoSocket) filter(fd int) error {
	if s.v6 {
		var f unix.ICMPv6Filter
		for i := range f.Data {
			f.Data[i] = ^uint32(0)
		}
		f.Data[s.reply()>>5] &^= 1 << (s.reply() & 31)
		return unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &f)
	}
	const icmpFilter = 1 // ICMP_FILTER, linux/icmp.h
	return unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, ^(1 << s.reply()))
}

func boundPort(fd int) (uint16, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port), nil
	case *unix.SockaddrInet6:
		return uint16(sa.Port), nil
	}
	return 0, unix.EAFNOSUPPORT
}

// register gives e a sequence number, unless too many requests are without an answer.
func (s *echoSocket) register(e echo) (seq uint16, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	client := toAddr(e.client)
	if !s.relay.pending.take(client) {
		s.sweepLocked(e.sent)
		if !s.relay.pending.take(client) {
			return 0, false
		}
	}
	for { // ends: maxEchoes is less than there are numbers
		s.next++
		if _, taken := s.open[s.next]; !taken {
			break
		}
	}
	s.open[s.next] = e
	return s.next, true
}

// sweepLocked forgets what has not been answered in time; not more often than is worth it.
func (s *echoSocket) sweepLocked(now time.Time) {
	if now.Sub(s.swept) < time.Second {
		return
	}
	s.swept = now
	for seq, e := range s.open {
		if now.Sub(e.sent) > echoTimeout {
			s.forgetLocked(seq, e)
		}
	}
}

func (s *echoSocket) forgetLocked(seq uint16, e echo) {
	delete(s.open, seq)
	s.relay.pending.put(toAddr(e.client))
}

// send sends message with our identifier and seq to host. It does not wait: an error is an echo without a reply.
func (s *echoSocket) send(message []byte, seq uint16, host netip.Addr) error {
	h := header.ICMPv4(message)
	h.SetIdent(s.ident)
	h.SetSequence(seq)
	var to unix.Sockaddr
	if s.v6 {
		to = &unix.SockaddrInet6{Addr: host.As16()} // the kernel makes the checksum
	} else {
		to = &unix.SockaddrInet4{Addr: host.As4()}
		h.SetChecksum(0)
		h.SetChecksum(^checksum.Checksum(message, 0))
	}
	var serr error
	err := s.raw.Write(func(fd uintptr) bool {
		serr = unix.Sendto(int(fd), message, 0, to)
		return true
	})
	return errors.Join(err, serr)
}

// receive sends replies on until the socket is closed.
func (s *echoSocket) receive() {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := s.conn.ReadFrom(buf)
		if err != nil {
			return // closed: an unconnected ICMP socket is not told of errors
		}
		b := buf[:n]
		if len(b) < header.ICMPv4MinimumSize || b[0] != s.reply() || header.ICMPv4(b).Ident() != s.ident {
			continue
		}
		if e, ok := s.answered(header.ICMPv4(b).Sequence(), from); ok {
			s.deliver(e, b[header.ICMPv4MinimumSize:])
		}
	}
}

// answered finds the request that a reply with seq from the given address belongs to.
func (s *echoSocket) answered(seq uint16, from net.Addr) (echo, bool) {
	var ip net.IP
	switch a := from.(type) {
	case *net.UDPAddr: // what package net takes a ping socket for
		ip = a.IP
	case *net.IPAddr:
		ip = a.IP
	}
	addr, _ := netip.AddrFromSlice(ip)
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.open[seq]
	if !ok || addr.Unmap() != e.host.Unmap() {
		return echo{}, false
	}
	s.forgetLocked(seq, e)
	return e, true
}

// deliver sends a reply to the container that asked.
func (s *echoSocket) deliver(e echo, payload []byte) {
	route, err := s.relay.stack.FindRoute(nicID, e.dialled, e.client, protocolOf(e.client), false)
	if err != nil {
		return
	}
	defer route.Release()
	h := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize))
	h.SetType(header.ICMPv4Type(s.reply()))
	h.SetIdent(e.id)
	h.SetSequence(e.seq)
	sendICMP(route, h, payload)
}

// sendICMP sends a message along route: a header of eight bytes, without checksum, and what follows it.
func sendICMP(route *stack.Route, h, payload []byte) {
	v := buffer.NewView(len(payload))
	v.Write(payload)
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: len(h) + int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithView(v),
	})
	defer pkt.DecRef()
	hdr := pkt.TransportHeader().Push(len(h))
	copy(hdr, h)
	proto := header.ICMPv4ProtocolNumber
	if route.NetProto() == header.IPv4ProtocolNumber {
		header.ICMPv4(hdr).SetChecksum(header.ICMPv4Checksum(hdr, pkt.Data().Checksum()))
	} else {
		proto = header.ICMPv6ProtocolNumber
		header.ICMPv6(hdr).SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
			Header: hdr, Src: route.LocalAddress(), Dst: route.RemoteAddress(),
			PayloadCsum: pkt.Data().Checksum(), PayloadLen: pkt.Data().Size(),
		}))
	}
	pkt.TransportProtocolNumber = proto
	route.WritePacket(stack.NetworkHeaderParams{Protocol: proto, TTL: route.DefaultTTL()}, pkt)
}

// sendPortUnreachable sends the ICMP error for a UDP packet that came from route's remote address. The packet is gone
// by then; what receivers look at is its addresses and its UDP header, and from those it is made again.
func sendPortUnreachable(route *stack.Route, udpHeader []byte) {
	h := make([]byte, header.ICMPv4MinimumSize)
	var quote []byte
	if route.NetProto() == header.IPv4ProtocolNumber {
		header.ICMPv4(h).SetType(header.ICMPv4DstUnreachable)
		header.ICMPv4(h).SetCode(header.ICMPv4PortUnreachable)
		ip := header.IPv4(make([]byte, header.IPv4MinimumSize))
		ip.Encode(&header.IPv4Fields{
			TotalLength: uint16(len(ip) + len(udpHeader)), TTL: route.DefaultTTL(), Protocol: uint8(header.UDPProtocolNumber),
			SrcAddr: route.RemoteAddress(), DstAddr: route.LocalAddress(),
		})
		ip.SetChecksum(^ip.CalculateChecksum())
		quote = ip
	} else {
		header.ICMPv6(h).SetType(header.ICMPv6DstUnreachable)
		header.ICMPv6(h).SetCode(header.ICMPv6PortUnreachable)
		ip := header.IPv6(make([]byte, header.IPv6MinimumSize))
		ip.Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(udpHeader)), TransportProtocol: header.UDPProtocolNumber, HopLimit: route.DefaultTTL(),
			SrcAddr: route.RemoteAddress(), DstAddr: route.LocalAddress(),
		})
		quote = ip
	}
	sendICMP(route, h, append(quote, udpHeader...))
}
