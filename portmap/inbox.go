package portmap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

const (
	// batchSize is how many messages one system call takes or gives: what comes in bursts costs one call for all of
	// it, and what comes alone costs no second call to learn that there is no more.
	batchSize = 16

	// maxMessage is more than any datagram has, or any number of them that the kernel passes as one (UDP_GRO).
	maxMessage = 64 << 10

	// controlSpace is room for the control messages of one message: struct in6_pktinfo, the longer one of the two, and
	// a number.
	controlSpace = 2*unix.SizeofCmsghdr + 24 + 8
)

// batch is the memory for the datagrams of one thread. Forwards have one only while they handle some, so that thousands
// of idle flows need no memory to speak of.
type batch struct {
	in  inbox
	out outbox
}

func newBatch() any {
	b := new(batch)
	b.in.init()
	return b
}

// inbox is where datagrams are received.
type inbox struct {
	headers  [batchSize]nonblock.Message
	iovecs   [batchSize]unix.Iovec
	names    [batchSize]unix.RawSockaddrInet6 // holds an IPv4 address as well
	controls [batchSize][controlSpace]byte
	buffers  [batchSize][]byte
}

func (in *inbox) init() {
	for i := range in.headers {
		// Memory that is never touched is never there: few sockets receive sixteen long messages in one call.
		in.buffers[i] = make([]byte, maxMessage)
		in.iovecs[i].Base = &in.buffers[i][0]
		in.iovecs[i].SetLen(maxMessage)
		h := &in.headers[i].Hdr
		h.Iov = &in.iovecs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&in.names[i]))
		h.Control = &in.controls[i][0]
	}
}

// receive takes what the socket has, up to batchSize messages, and returns their number.
func (in *inbox) receive(fd int) (int, error) {
	for i := range in.headers {
		h := &in.headers[i].Hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(controlSpace)
	}
	return nonblock.Recvmmsg(fd, in.headers[:])
}

// message is the i-th of those received: one datagram, or several, each but for the last with segment bytes.
func (in *inbox) message(i int) (b []byte, segment int) {
	b = in.buffers[i][:in.headers[i].Len]
	if n := segmentSize(in.control(i)); n > 0 && n < len(b) {
		return b, n
	}
	return b, len(b)
}

func (in *inbox) control(i int) []byte {
	return in.controls[i][:min(in.headers[i].Hdr.Controllen, controlSpace)]
}

func (in *inbox) name(i int) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&in.names[i])), min(in.headers[i].Hdr.Namelen, unix.SizeofSockaddrInet6))
}

// alike tells whether the i-th one came from where the one before it did, for the same address.
func (in *inbox) alike(i int) bool {
	return bytes.Equal(in.name(i), in.name(i-1)) && bytes.Equal(in.control(i), in.control(i-1))
}

// client is the address that the i-th one came from, and the scope of a link-local one.
func (in *inbox) client(i int) (client netip.AddrPort, scope uint32) {
	sa := &in.names[i]
	port := (*[2]byte)(unsafe.Pointer(&sa.Port)) // at the same place in both
	p := binary.BigEndian.Uint16(port[:])
	if sa.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr), p), 0
	}
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), p), sa.Scope_id
}
