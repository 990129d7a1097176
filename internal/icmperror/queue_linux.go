package icmperror

import (
	"encoding/binary"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxQuoted is the length of the longest ICMPv6 error (RFC 4443, section 2.4), which is longer than those of IPv4.
const maxQuoted = 1280

// Ask makes the kernel queue the errors that are about a socket's packets (IP_RECVERR, ip(7)).
func Ask(fd int, v4 bool) error {
	level, option := unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	if v4 {
		level, option = unix.IPPROTO_IP, unix.IP_RECVERR
	}
	return os.NewSyscallError("set IP_RECVERR", unix.SetsockoptInt(fd, level, option, 1))
}

// Entry is an error that the kernel has queued for a socket.
type Entry struct {
	Message
	Local  bool       // the kernel's own: a datagram was longer than MTU, and not sent
	Quoted []byte     // of the datagram, behind its UDP header, or of an ICMP message, from its header on
	To     netip.Addr // where that was sent to
}

// Queue reads the error queues of sockets, one at a time. The zero value is ready.
type Queue struct {
	quoted  [maxQuoted]byte
	control [512]byte
}

// Read takes one entry off the queue of a socket, and leaves out what is of no interest to the sender of a packet; false: there was
// none. What it quotes is there until the next call.
func (q *Queue) Read(fd int) (Entry, bool) {
	for {
		n, controlLen, _, sa, err := unix.Recvmsg(fd, q.quoted[:], q.control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return Entry{}, false
		}
		m, local, ok := parse(q.control[:controlLen])
		if !ok {
			continue
		}
		e := Entry{Message: m, Local: local, Quoted: q.quoted[:n]}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			e.To = netip.AddrFrom4(sa.Addr)
		case *unix.SockaddrInet6:
			e.To = netip.AddrFrom16(sa.Addr)
		}
		return e, true
	}
}

// parse reads the control messages of an entry. It returns false for what is of no interest to the sender of a packet.
func parse(control []byte) (m Message, local, ok bool) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return Message{}, false, false
	}
	const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
	for _, c := range messages {
		v4 := c.Header.Level == unix.IPPROTO_IP && c.Header.Type == unix.IP_RECVERR
		v6 := c.Header.Level == unix.IPPROTO_IPV6 && c.Header.Type == unix.IPV6_RECVERR
		if !v4 && !v6 || len(c.Data) < size {
			continue
		}
		errno := unix.Errno(binary.NativeEndian.Uint32(c.Data))
		origin, info := c.Data[4], binary.NativeEndian.Uint32(c.Data[8:])
		switch {
		case origin == unix.SO_EE_ORIGIN_LOCAL && errno == unix.EMSGSIZE:
			return TooBig(v4, info), true, true
		case origin == unix.SO_EE_ORIGIN_ICMP && v4, origin == unix.SO_EE_ORIGIN_ICMP6 && v6:
			m = Message{From: offender(c.Data[size:]), Type: c.Data[5], Code: c.Data[6]}
			if m.IsTooBig(v4) {
				m.MTU = info
			}
			return m, false, Passes(v4, m.Type)
		}
	}
	return Message{}, false, false
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
