package flows

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
)

// echoBuffer is for what waits to be sent: requests to neighbours that are not there stay for three seconds, and others
// must fit beside them.
const echoBuffer = 4 << 20

// pinger is the socket of an echoSocket.
type pinger struct {
	of *echoSocket
	watched
	raw   bool // receives IPv4 headers
	ident uint16

	// The destination, under the echoSocket's sending lock: here it need not be allocated.
	to4 unix.SockaddrInet4
	to6 unix.SockaddrInet6
}

// openPinger opens a ping socket (net.ipv4.ping_group_range says who may), or a raw one (CAP_NET_RAW). The socket's lock
// is held.
func openPinger(s *echoSocket) (_ *pinger, err error) {
	if !s.isRunning() {
		return nil, errEnded
	}
	domain, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var unbound unix.Sockaddr = &unix.SockaddrInet4{}
	if !s.v4 {
		domain, proto, unbound = unix.AF_INET6, unix.IPPROTO_ICMPV6, &unix.SockaddrInet6{}
	}
	p := &pinger{of: s}
	const flags = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|flags, proto)
	if err != nil {
		p.raw, p.ident = true, uint16(rand.Uint32())
		var rawErr error
		if fd, rawErr = unix.Socket(domain, unix.SOCK_RAW|flags, proto); rawErr != nil {
			return nil, fmt.Errorf("open a ping socket (see net.ipv4.ping_group_range): %w", err)
		}
		err = s.filter(fd)
	} else if err = unix.Bind(fd, unbound); err == nil {
		// Bound to no port in particular, the kernel chooses one: it is the identifier in our requests.
		p.ident, err = boundPort(fd)
	}
	if err == nil {
		err = icmperror.Ask(fd, s.v4)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set up a ping socket: %w", err)
	}
	roomy(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, echoBuffer)
	p.init(&s.pollers, fd)
	if err := p.watch(p); err != nil {
		p.watched.close()
		return nil, err
	}
	return p, nil
}

func (p *pinger) close() error {
	p.watched.close()
	return nil
}

// filter makes a raw socket receive echo replies only; it would get every ICMP message of the host.
func (s *echoSocket) filter(fd int) error {
	reply := s.replyType()
	if s.v4 {
		const icmpFilter = 1 // ICMP_FILTER, linux/icmp.h
		return os.NewSyscallError("set ICMP_FILTER", unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, ^(1<<reply)))
	}
	var f unix.ICMPv6Filter
	for i := range f.Data {
		f.Data[i] = ^uint32(0)
	}
	f.Data[reply>>5] &^= 1 << (reply & 31)
	return os.NewSyscallError("set ICMPV6_FILTER", unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &f))
}

func boundPort(fd int) (uint16, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, os.NewSyscallError("getsockname", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port), nil
	case *unix.SockaddrInet6:
		return uint16(sa.Port), nil
	}
	return 0, unix.EAFNOSUPPORT
}

// send sends a message to host. The echoSocket's sending lock is held.
func (p *pinger) send(host netip.Addr, path pathOptions, message []byte) (told icmperror.Message, err error) {
	if !p.hold() {
		return told, errEnded
	}
	defer p.release()
	v4 := p.of.v4
	p.of.path.set(p.fd, v4, path)
	var sa unix.Sockaddr = &p.to6
	if v4 {
		sa, p.to4.Addr = &p.to4, host.As4()
	} else {
		p.to6.Addr = host.As16()
	}
	for range 3 {
		err = unix.Sendto(p.fd, message, unix.MSG_DONTWAIT, sa)
		switch err {
		case nil, unix.EAGAIN, unix.ENOBUFS, unix.EACCES:
			return told, err
		case unix.ENETUNREACH, unix.EHOSTUNREACH:
			told = icmperror.HostUnreachable(v4)
		case unix.EMSGSIZE:
			if mtu := wayTo(host); isLonger(len(message), mtu, v4) {
				return icmperror.TooBig(v4, mtu), err
			}
		}
		// It may be an earlier request's error.
		p.readErrors(new(icmperror.Queue))
	}
	return told, err
}

// wayTo is the MTU of the way to host; zero: unknown. The ping socket's own error queue tells as well, but to whoever
// reads it first.
func wayTo(host netip.Addr) uint32 {
	fd, err := connect(netip.AddrPortFrom(host, 9))
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	return pathMTU(fd, host.Is4())
}

// receive sends replies on.
func (p *pinger) receive(in *inbox) (more bool) {
	if !p.hold() {
		return false
	}
	defer p.release()
	n, err := in.receive(p.fd, true)
	if err == unix.EAGAIN {
		return false
	}
	if err != nil {
		p.readErrors(&in.queue)
		return true
	}
	for i := range n {
		m := in.datagram(i)
		if p.raw && p.of.v4 && len(m) > 0 {
			m = m[min(int(m[0]&0xf)*4, len(m)):]
		}
		p.of.answer(m, p.ident, in.from(i))
	}
	return n == inboxSize
}

// readErrors sends the errors that wait in the socket's queue to the guests whose requests they are about.
func (p *pinger) readErrors(queue *icmperror.Queue) {
	for {
		e, more := queue.Read(p.fd)
		if !more {
			return
		}
		if e.Local { // what is too long, the guest is told where it is sent
			continue
		}
		if q, ok := parseRequest(p.of.v4, e.Quoted); ok && q.ident == p.ident {
			q.dst = e.To
			p.of.fail(e.Message, q)
		}
	}
}
