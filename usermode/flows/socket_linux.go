package flows

import (
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nonblock"
)

const flowBuffer = 1 << 20 // bytes that may wait in a flow's socket for us

// socket is a flow's.
type socket struct{ watched }

// dial opens the flow's socket.
func (f *udpFlow) dial() error {
	fd, err := connect(f.host)
	if err == nil {
		f.watched.init(&f.table.pollers, fd)
	}
	return err
}

// connect opens a non-blocking UDP socket that is connected to dst and queues errors. It is not made by package net,
// which would let it send to broadcast addresses.
func connect(dst netip.AddrPort) (fd int, err error) {
	v4 := dst.Addr().Is4()
	family := unix.AF_INET6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
	if v4 {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(dst.Port()), Addr: dst.Addr().As4()}
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := icmperror.Ask(fd, v4); err != nil {
		return -1, err
	}
	roomy(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, flowBuffer)
	return fd, os.NewSyscallError("connect", connectTo(fd, sa))
}

// connectTo connects a socket and forgets what has come until then: the kernel gives it a port first, and connects it in a second step. In
// between it receives from anybody, an answer for a guest whose flow had the port before, for one.
func connectTo(fd int, to unix.Sockaddr) error {
	if err := unix.Connect(fd, to); err != nil {
		return err
	}
	var b [1]byte
	for range 1000 { // of the peer's own there may be more at any time
		if _, err := unix.Read(fd, b[:]); err == unix.EAGAIN {
			break
		}
	}
	return nil
}

// watch has the flow's datagrams received from now on.
func (f *udpFlow) watch() bool { return f.watched.watch(f) == nil }

// isExhausted tells whether err is that the process or the host has no more sockets, or ports for them (EAGAIN).
func isExhausted(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// isUnreachable tells whether err is that no way leads to a destination.
func isUnreachable(err error) bool {
	return errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) ||
		errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// send sends a burst to the host's side, and returns how many of its datagrams were lost; false: the flow has ended. It does
// not wait: a full socket buffer loses datagrams, as a full queue does on any path.
func (f *udpFlow) send(b *burst) (lost int, ok bool) {
	if !f.hold() {
		return 0, false
	}
	defer f.release()
	f.sending.Lock()
	defer f.sending.Unlock()
	f.path.set(f.fd, f.host.Addr().Is4(), pathOptions{b.hops, b.whole})
	if !f.single && areSegments(b.payloads) {
		switch err := sendSegments(f.fd, b.payloads); err {
		case nil:
			return 0, true
		case unix.EAGAIN, unix.ENOBUFS:
			return len(b.payloads), true
		case unix.EINVAL, unix.EIO, unix.EMSGSIZE:
			// Longer than the way to the destination is wide, or not to be had for it, or in this kernel.
			f.single = true
		}
	}
	for _, p := range b.payloads {
		if f.sendOne(b, p) != nil {
			lost++
		}
	}
	return lost, true
}

// sendOne sends a datagram of a burst.
func (f *udpFlow) sendOne(b *burst, payload []byte) error {
	v4 := f.host.Addr().Is4()
	for try := 0; ; try++ {
		err := nonblock.Send(f.fd, payload)
		if err == nil || err == unix.EAGAIN || err == unix.ENOBUFS || try == 2 {
			if err == unix.ENETUNREACH || err == unix.EHOSTUNREACH {
				f.table.reject(icmperror.HostUnreachable(v4), b, payload) // the route has gone
			}
			return err
		}
		if err == unix.EMSGSIZE {
			if mtu := pathMTU(f.fd, v4); isLonger(len(payload)+udpHdrLen, mtu, v4) {
				f.table.reject(icmperror.TooBig(v4, mtu), b, payload)
				return err
			}
		}
		// Most errors belong to an earlier datagram, and this one has not been sent.
		f.readErrors(new(icmperror.Queue))
	}
}

// receive carries what the host's side sends to the guest.
func (f *udpFlow) receive(in *inbox) (more bool) {
	if !f.hold() {
		return false
	}
	defer f.release()
	n, err := in.receive(f.fd, false)
	if err == unix.EAGAIN {
		return false
	}
	if err != nil {
		f.readErrors(&in.queue)
		return true // there may be datagrams behind it
	}
	f.touch()
	f.deliver(in.datagrams(n))
	// Fewer than there is room for are all; if an error kept the rest from us, it has its own event.
	return n == inboxSize
}

// readErrors sends the errors that wait in the socket's queue to the guest.
func (f *udpFlow) readErrors(q *icmperror.Queue) {
	for {
		e, more := q.Read(f.fd)
		if !more {
			return
		}
		if !e.Local { // what is too long, the guest is told where it is sent
			f.reject(e.Message, e.Quoted)
		}
	}
}

// set makes the socket send with TTL and DF as asked for, which mostly they are already.
func (o *pathOptions) set(fd int, v4 bool, want pathOptions) {
	if *o == want {
		return
	}
	level, ttl, discover, value := unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DONT
	if v4 {
		level, ttl, discover, value = unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT
	}
	if want.whole {
		value = unix.IP_PMTUDISC_DO // IPv6 has the same number
	}
	// Zero is what a new socket has; a packet on its way has more.
	if o.hops != want.hops {
		unix.SetsockoptInt(fd, level, ttl, int(max(want.hops, 1)))
	}
	if o.whole != want.whole || o.hops == 0 {
		unix.SetsockoptInt(fd, level, discover, value)
	}
	*o = want
}

// pathMTU is the MTU of the way to what the socket is connected to; zero: unknown.
func pathMTU(fd int, v4 bool) uint32 {
	level, option := unix.IPPROTO_IPV6, unix.IPV6_MTU
	if v4 {
		level, option = unix.IPPROTO_IP, unix.IP_MTU
	}
	mtu, err := unix.GetsockoptInt(fd, level, option)
	if err != nil {
		return 0
	}
	return uint32(mtu)
}

// isLonger tells whether an IP packet with so many bytes behind its header is longer than mtu.
func isLonger(n int, mtu uint32, v4 bool) bool {
	if v4 {
		return n+ipv4HdrLen > int(mtu) && mtu > 0
	}
	return n+ipv6HdrLen > int(mtu) && mtu > 0
}

// roomy gives a socket a receive or send buffer, as long as the kernel allows.
func roomy(fd, force, option, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size)
	}
}
