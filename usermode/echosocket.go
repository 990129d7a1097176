package usermode

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nonblock"
)

// echoBuffer is for what waits to be sent: requests to neighbours that are not there stay for three seconds, and others
// must fit beside them.
const echoBuffer = 4 << 20

// echoSocket sends the requests of one IP version. All have the same identifier; the sequence number tells them apart.
type echoSocket struct {
	relay *echoRelay
	v4    bool

	tried bool // to open it
	fd    int  // negative: there is none
	place int32
	raw   bool // receives IPv4 headers
	ident uint16
	path  pathOptions

	// What sendTo gives to the kernel.
	header [icmpHdrLen]byte
	name   unix.RawSockaddrInet6
	iovecs [3]unix.Iovec
	msg    unix.Msghdr

	next  uint16
	swept time.Time
	open  map[uint16]echo
}

func (s *echoSocket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.relay.poller.remove(s.place)
	}
}

// available opens the socket when it is first used, and tells whether there is one.
func (s *echoSocket) available() bool {
	if !s.tried {
		s.tried = true
		if err := s.dial(); err != nil {
			s.relay.cfg.Log.Warn("containers cannot ping (see net.ipv4.ping_group_range)", "ipv6", !s.v4, "err", err)
		}
	}
	return s.fd >= 0
}

// register gives e a sequence number, unless too many requests are without an answer.
func (s *echoSocket) register(e echo) (seq uint16, ok bool) {
	if !s.relay.pending.Take(e.client) {
		s.sweep(e.sent)
		if !s.relay.pending.Take(e.client) {
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

// sweep forgets what has not been answered in time; not more often than is worth it.
func (s *echoSocket) sweep(now time.Time) {
	if now.Sub(s.swept) < time.Second {
		return
	}
	s.swept = now
	for seq, e := range s.open {
		if now.Sub(e.sent) > s.relay.patience {
			s.forget(seq, e)
		}
	}
}

func (s *echoSocket) forget(seq uint16, e echo) {
	delete(s.open, seq)
	s.relay.pending.Put(e.client)
}

// asked finds the request with seq that was sent to host.
func (s *echoSocket) asked(seq uint16, host netip.Addr) (echo, bool) {
	e, ok := s.open[seq]
	return e, ok && host.Unmap() == e.host.Unmap()
}

// dial opens a ping socket (net.ipv4.ping_group_range says who may), or a raw one (CAP_NET_RAW).
func (s *echoSocket) dial() (err error) {
	domain, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var unbound unix.Sockaddr = &unix.SockaddrInet4{}
	if !s.v4 {
		domain, proto, unbound = unix.AF_INET6, unix.IPPROTO_ICMPV6, &unix.SockaddrInet6{}
	}
	const flags = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|flags, proto)
	if err == nil {
		// Bound to no port in particular, the kernel chooses one: it is the identifier in our requests.
		if err = unix.Bind(fd, unbound); err == nil {
			s.ident, err = boundPort(fd)
		}
	} else if fd, err = unix.Socket(domain, unix.SOCK_RAW|flags, proto); err == nil {
		s.raw, s.ident = true, uint16(rand.Uint32())
		err = s.filter(fd)
	}
	if err == nil {
		err = icmperror.Ask(fd, s.v4)
	}
	if err == nil {
		s.place, err = s.relay.poller.add(fd, s)
	}
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("open ICMP socket: %w", err)
	}
	roomy(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, echoBuffer)
	s.fd = fd
	return nil
}

// filter makes a raw socket receive echo replies only; it would get every ICMP message of the host.
func (s *echoSocket) filter(fd int) error {
	reply := replyType(s.v4)
	if s.v4 {
		const icmpFilter = 1 // ICMP_FILTER, linux/icmp.h
		return unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, ^(1 << reply))
	}
	var f unix.ICMPv6Filter
	for i := range f.Data {
		f.Data[i] = ^uint32(0)
	}
	f.Data[reply>>5] &^= 1 << (reply & 31)
	return unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &f)
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

// send sends the request d with our identifier and seq to host, and reports whether it went. What comes in the way is
// told to the container.
func (s *echoSocket) send(d *datagram, seq uint16, host netip.Addr) bool {
	s.path.set(s.fd, s.v4, d.hops, d.whole)
	m := header.ICMPv4(s.header[:])
	clear(m)
	m.SetType(header.ICMPv4Type(requestType(s.v4)))
	m.SetIdent(s.ident)
	m.SetSequence(seq)
	if s.v4 { // the kernel makes the other one's checksum
		// The first part has an even length when there is a second.
		m.SetChecksum(^checksum.Checksum(d.payload[1], checksum.Checksum(d.payload[0], checksum.Checksum(m, 0))))
	}
	for range 3 {
		err := s.sendTo(host, s.header[:], d.payload[0], d.payload[1])
		if err == nil {
			return true
		}
		mtu := s.readErrors()
		switch {
		case err == unix.EMSGSIZE && mtu > 0:
			s.reject(icmperror.TooBig(s.v4, mtu), d)
			return false
		case err == unix.ENETUNREACH || err == unix.EHOSTUNREACH:
			s.reject(icmperror.HostUnreachable(s.v4), d)
			return false
		case err == unix.EAGAIN || err == unix.ENOBUFS || err == unix.EACCES:
			return false
		}
	}
	return false
}

func (s *echoSocket) reject(e icmperror.Message, d *datagram) {
	s.relay.report(e, d.client.Addr(), d.dst.Addr(), d.header, d.payload[0])
}

// sendTo is sendmsg(2) without the allocations of package unix.
func (s *echoSocket) sendTo(host netip.Addr, parts ...[]byte) error {
	iovecs := s.iovecs[:0]
	for _, p := range parts {
		if len(p) > 0 {
			iov := unix.Iovec{Base: &p[0]}
			iov.SetLen(len(p))
			iovecs = append(iovecs, iov)
		}
	}
	s.msg = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&s.name)), Iov: &s.iovecs[0]}
	s.msg.SetIovlen(len(iovecs))
	if s.v4 {
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&s.name)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: host.As4()}
		s.msg.Namelen = unix.SizeofSockaddrInet4
	} else {
		s.name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: host.As16()}
		s.msg.Namelen = unix.SizeofSockaddrInet6
	}
	return nonblock.Sendmsg(s.fd, &s.msg)
}

// ready sends replies on.
func (s *echoSocket) ready() {
	in := s.relay.inbox()
	n, err := in.receive(s.fd)
	if err != nil {
		s.readErrors()
		return
	}
	for i := range n {
		b := in.datagram(i)
		m := b[headroom:]
		if s.raw && s.v4 && len(m) > 0 {
			m = m[min(int(m[0]&0xf)*4, len(m)):]
		}
		h := header.ICMPv4(m)
		if len(m) < icmpHdrLen || m[0] != replyType(s.v4) || h.Ident() != s.ident {
			continue
		}
		if e, ok := s.asked(h.Sequence(), in.from(i)); ok {
			s.forget(h.Sequence(), e)
			s.relay.deliver(e, b[len(b)-len(m)-icmpRoom:])
		}
	}
}

// readErrors sends the errors that wait in the socket's queue to the containers whose requests they are about. Where
// one is that a request was too long for the way to its destination and did not leave the host, it returns that way's
// MTU.
func (s *echoSocket) readErrors() (mtu uint32) {
	for {
		e, more := s.relay.queue.Read(s.fd)
		if !more {
			return mtu
		}
		if e.Local {
			mtu = e.MTU
			continue
		}
		h := header.ICMPv4(e.Quoted)
		if len(h) < icmpHdrLen || h[0] != requestType(s.v4) || h.Ident() != s.ident {
			continue
		}
		sent, ok := s.asked(h.Sequence(), e.To)
		if !ok {
			continue
		}
		s.forget(h.Sequence(), sent)
		var quote [icmpRoom + maxError6]byte
		b := quote[:icmpRoom+copy(quote[icmpRoom:], e.Quoted)]
		q := header.ICMPv4(b[icmpRoom:])
		q.SetIdent(sent.id)
		q.SetSequence(sent.seq)
		frame := putICMP(b, sent.client, sent.dialled, 0)
		s.relay.report(e.Message, sent.client, sent.dialled, frame[virtioHdrLen:])
	}
}
