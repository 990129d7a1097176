package usermode

import (
	"encoding/binary"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// hostError is an error that the host's kernel has queued for a socket (IP_RECVERR, ip(7)).
type hostError struct {
	icmp  icmpError // its message, where it came from outside
	local bool      // the kernel's own: a datagram was longer than icmp.mtu, and not sent
}

// parseHostError reads the control messages of an entry of an error queue. It returns false for what is of no
// interest to a container.
func parseHostError(control []byte) (hostError, bool) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return hostError{}, false
	}
	const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
	for _, m := range messages {
		v4 := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR
		v6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		if !v4 && !v6 || len(m.Data) < size {
			continue
		}
		errno := unix.Errno(binary.NativeEndian.Uint32(m.Data))
		origin, kind, code, info := m.Data[4], m.Data[5], m.Data[6], binary.NativeEndian.Uint32(m.Data[8:])
		e := icmpError{kind: kind, code: code, from: offender(m.Data[size:])}
		switch {
		case origin == unix.SO_EE_ORIGIN_LOCAL && errno == unix.EMSGSIZE:
			return hostError{icmp: tooBig(v4, info), local: true}, true
		case origin == unix.SO_EE_ORIGIN_ICMP && v4:
			if e.isTooBig(true) {
				e.mtu = info
			}
			return hostError{icmp: e}, passes4(kind)
		case origin == unix.SO_EE_ORIGIN_ICMP6 && v6:
			if e.isTooBig(false) {
				e.mtu = info
			}
			return hostError{icmp: e}, passes6(kind)
		}
	}
	return hostError{}, false
}

func (e icmpError) isTooBig(v4 bool) bool {
	if v4 {
		return e.kind == uint8(header.ICMPv4DstUnreachable) && e.code == uint8(header.ICMPv4FragmentationNeeded)
	}
	return e.kind == uint8(header.ICMPv6PacketTooBig)
}

// passes4 tells whether a message of this kind is for the sender of the packet it quotes. Redirects are for the host;
// source quench is abolished (RFC 6633).
func passes4(kind uint8) bool {
	switch header.ICMPv4Type(kind) {
	case header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
		return true
	}
	return false
}

func passes6(kind uint8) bool {
	switch header.ICMPv6Type(kind) {
	case header.ICMPv6DstUnreachable, header.ICMPv6PacketTooBig, header.ICMPv6TimeExceeded, header.ICMPv6ParamProblem:
		return true
	}
	return false
}

// offender is the address in a struct sockaddr_in or sockaddr_in6, unless it is one that a container must not be shown.
func offender(b []byte) (a netip.Addr) {
	if len(b) < 2 {
		return a
	}
	switch family := binary.NativeEndian.Uint16(b); {
	case family == unix.AF_INET && len(b) >= unix.SizeofSockaddrInet4:
		a = netip.AddrFrom4([4]byte(b[4:8]))
	case family == unix.AF_INET6 && len(b) >= unix.SizeofSockaddrInet6:
		a = netip.AddrFrom16([16]byte(b[8:24]))
	}
	if isReserved(a) {
		return netip.Addr{}
	}
	return a
}

// errorQueue reads the error queues of sockets.
type errorQueue struct {
	payload [maxError6]byte
	control [512]byte
}

// read takes one entry off the queue of a socket. payload is what the message quotes of the datagram behind its UDP
// header, or of an ICMP message from its header on, and dst where it was sent to. more is false when there was none.
func (q *errorQueue) read(fd int) (e hostError, payload []byte, dst netip.Addr, more bool) {
	for {
		n, controlLen, _, sa, err := unix.Recvmsg(fd, q.payload[:], q.control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return hostError{}, nil, netip.Addr{}, false
		}
		e, ok := parseHostError(q.control[:controlLen])
		if !ok {
			continue
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			dst = netip.AddrFrom4(sa.Addr)
		case *unix.SockaddrInet6:
			dst = netip.AddrFrom16(sa.Addr)
		}
		return e, q.payload[:n], dst, true
	}
}

// How many ICMP errors a container may get: so many at once, and so many in a second. Programs that trace routes ask
// for dozens at once.
const (
	errorBurst = 100
	errorRate  = 100
	maxBuckets = 1024
)

// errorLimit bounds the ICMP errors for each container, as RFC 1812 and RFC 4443 ask routers to. The zero value has
// sent none yet.
type errorLimit struct {
	buckets map[netip.Addr]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

// take tells whether client may get another.
func (l *errorLimit) take(client netip.Addr, now time.Time) bool {
	b, ok := l.buckets[client]
	if !ok {
		if l.buckets == nil || len(l.buckets) >= maxBuckets {
			l.buckets = make(map[netip.Addr]bucket) // forgetting is harmless: everybody gets another burst
		}
		b = bucket{left: errorBurst, at: now}
	}
	b.left = min(errorBurst, b.left+now.Sub(b.at).Seconds()*errorRate)
	b.at = now
	ok = b.left >= 1
	if ok {
		b.left--
	}
	l.buckets[client] = b
	return ok
}
