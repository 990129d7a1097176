package flows

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// parseHostError reads the control messages of an entry of a socket's error queue (IP_RECVERR, ip(7)). It returns false
// for what is of no interest to a guest, or was told already: a datagram that is too long is refused as it is sent.
func parseHostError(control []byte) (icmpError, bool) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return icmpError{}, false
	}
	const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
	for _, m := range messages {
		v4 := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR
		v6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		if !v4 && !v6 || len(m.Data) < size {
			continue
		}
		origin, kind, code := m.Data[4], m.Data[5], m.Data[6]
		if v4 && origin != unix.SO_EE_ORIGIN_ICMP || v6 && origin != unix.SO_EE_ORIGIN_ICMP6 {
			return icmpError{}, false
		}
		e := icmpError{kind: kind, code: code, from: offender(m.Data[size:])}
		if v4 && kind == unreachable4 && code == needFragment4 || v6 && kind == tooBig6 {
			e.mtu = binary.NativeEndian.Uint32(m.Data[8:])
		}
		return e, passes(v4, kind)
	}
	return icmpError{}, false
}

// offender is the address in a struct sockaddr_in or sockaddr_in6.
func offender(b []byte) netip.Addr {
	if len(b) < 2 {
		return netip.Addr{}
	}
	switch family := binary.NativeEndian.Uint16(b); {
	case family == unix.AF_INET && len(b) >= unix.SizeofSockaddrInet4:
		return netip.AddrFrom4([4]byte(b[4:8]))
	case family == unix.AF_INET6 && len(b) >= unix.SizeofSockaddrInet6:
		return netip.AddrFrom16([16]byte(b[8:24]))
	}
	return netip.Addr{}
}

// tooBig is RFC 1191, section 4, and RFC 8201.
func tooBig(v4 bool, mtu uint32) icmpError {
	if v4 {
		return icmpError{kind: unreachable4, code: needFragment4, mtu: mtu}
	}
	return icmpError{kind: tooBig6, mtu: mtu}
}

// errorQueue reads the error queues of sockets.
type errorQueue struct {
	payload [maxError6]byte
	control [512]byte
}

// read takes one entry off the queue of a socket. payload is what the message quotes of the datagram behind its UDP
// header, or of an ICMP message from its header on, and dst where it was sent to. more is false when there was none.
func (q *errorQueue) read(fd int) (e icmpError, payload []byte, dst netip.Addr, more bool) {
	for {
		n, controlLen, _, sa, err := unix.Recvmsg(fd, q.payload[:], q.control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return icmpError{}, nil, netip.Addr{}, false
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
