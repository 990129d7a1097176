package flows

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nonblock"
)

const (
	maxDatagram = 65535 // bytes, more than any

	// How many datagrams one recvmmsg(2) takes. What comes in bursts costs one call for all of them, and what comes
	// alone costs no second call to learn that there is no more.
	inboxSize = 16
)

// inbox is where a poller's sockets receive. It is used again for the next one.
type inbox struct {
	headers [inboxSize]nonblock.Message
	iovecs  [inboxSize]unix.Iovec
	names   [inboxSize]unix.RawSockaddrInet6 // holds an IPv4 address as well
	buffers [inboxSize][]byte
	filled  [inboxSize][]byte
	queue   icmperror.Queue
}

func newInbox() *inbox {
	in := &inbox{}
	for i := range in.headers {
		// Memory that is never touched is never there: few sockets receive sixteen long datagrams in one call.
		in.buffers[i] = make([]byte, maxDatagram)
		in.iovecs[i].Base = &in.buffers[i][0]
		in.iovecs[i].SetLen(maxDatagram)
		h := &in.headers[i].Hdr
		h.Iov = &in.iovecs[i]
		h.SetIovlen(1)
	}
	return in
}

// receive takes what the socket has, up to inboxSize datagrams, and returns their number. With named, it asks where
// they come from.
func (in *inbox) receive(fd int, named bool) (int, error) {
	for i := range in.headers {
		h := &in.headers[i].Hdr
		if h.Name, h.Namelen = nil, 0; named {
			h.Name, h.Namelen = (*byte)(unsafe.Pointer(&in.names[i])), unix.SizeofSockaddrInet6
		}
	}
	return nonblock.Recvmmsg(fd, in.headers[:])
}

// datagrams are the first n of those received.
func (in *inbox) datagrams(n int) [][]byte {
	for i := range n {
		in.filled[i] = in.datagram(i)
	}
	return in.filled[:n]
}

// datagram is the i-th of those received.
func (in *inbox) datagram(i int) []byte { return in.buffers[i][:in.headers[i].Len] }

// from is the address that the i-th one came from.
func (in *inbox) from(i int) netip.Addr {
	sa := &in.names[i]
	switch sa.Family {
	case unix.AF_INET:
		return netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr)
	case unix.AF_INET6:
		return netip.AddrFrom16(sa.Addr)
	}
	return netip.Addr{}
}
