package usermode

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

const (
	maxDatagram = 65535 // bytes, more than any

	// How many datagrams one recvmmsg(2) takes. What comes in bursts costs one call for all of them, and what comes
	// alone costs no second call to learn that there is no more.
	inboxSize = 16
	// Room in front of each, for the headers that it gets on the way to a container.
	headroom = virtioHdrLen + ipv6HdrLen + udpHdrLen
)

// inbox is where datagrams are received. It is used again for the next ones.
type inbox struct {
	headers [inboxSize]nonblock.Message
	iovecs  [inboxSize]unix.Iovec
	names   [inboxSize]unix.RawSockaddrInet6 // holds an IPv4 address as well
	buffers [inboxSize][]byte
}

func newInbox() *inbox {
	in := &inbox{}
	for i := range in.headers {
		// Memory that is never touched is never there: few sockets receive sixteen long datagrams in one call.
		in.buffers[i] = make([]byte, headroom+maxDatagram)
		in.iovecs[i].Base = &in.buffers[i][headroom]
		in.iovecs[i].SetLen(maxDatagram)
		h := &in.headers[i].Hdr
		h.Iov = &in.iovecs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&in.names[i]))
	}
	return in
}

// receive takes what the socket has, up to inboxSize datagrams, and returns their number.
func (in *inbox) receive(fd int) (int, error) {
	for i := range in.headers {
		in.headers[i].Hdr.Namelen = unix.SizeofSockaddrInet6
	}
	return nonblock.Recvmmsg(fd, in.headers[:])
}

// datagram is the i-th of those received, with headroom bytes in front of it.
func (in *inbox) datagram(i int) []byte { return in.buffers[i][:headroom+int(in.headers[i].Len)] }

// from is the address that the i-th one came from.
func (in *inbox) from(i int) netip.Addr { return rawAddr(&in.names[i]) }

// rawAddr is the address in sa, which may be a struct sockaddr_in as well.
func rawAddr(sa *unix.RawSockaddrInet6) netip.Addr {
	switch sa.Family {
	case unix.AF_INET:
		return netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr)
	case unix.AF_INET6:
		return netip.AddrFrom16(sa.Addr)
	}
	return netip.Addr{}
}
