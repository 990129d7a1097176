package flows

import (
	"encoding/binary"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// What one sendmsg(2) with UDP_SEGMENT may carry: udp(7), UDP_MAX_SEGMENTS in linux/udp.h.
const (
	maxSegments   = 64
	segmentOption = 0x67 // UDP_SEGMENT, of level IPPROTO_UDP
)

// segments are the arguments of a sendmsg(2) with several datagrams, which the kernel takes through all of its layers as one, and cuts
// at the end of its own way, or where they are received.
type segments struct {
	iovecs  [maxSegments]unix.Iovec
	control [unix.SizeofCmsghdr + 8]byte
	msg     unix.Msghdr
}

var segmentsPool = sync.Pool{New: func() any { return new(segments) }}

// areSegments tells whether datagrams go together: all but the last have the same length, and that has no more.
func areSegments(payloads [][]byte) bool {
	n := len(payloads)
	if n < 2 || n > maxSegments {
		return false
	}
	size, last := len(payloads[0]), len(payloads[n-1])
	for _, p := range payloads[:n-1] {
		if len(p) != size {
			return false
		}
	}
	return 0 < last && last <= size && (n-1)*size+last <= maxDatagram-ipv4HdrLen-udpHdrLen
}

// sendSegments sends datagrams that go together on a connected socket, all of them or none. It does not wait.
func sendSegments(fd int, payloads [][]byte) error {
	size := len(payloads[0])
	s := segmentsPool.Get().(*segments)
	defer segmentsPool.Put(s)
	defer clear(s.iovecs[:len(payloads)])
	for i, p := range payloads {
		s.iovecs[i].Base = &p[0]
		s.iovecs[i].SetLen(len(p))
	}
	c := (*unix.Cmsghdr)(unsafe.Pointer(&s.control))
	c.Level, c.Type = unix.IPPROTO_UDP, segmentOption
	c.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(s.control[unix.CmsgLen(0):], uint16(size))
	s.msg = unix.Msghdr{Iov: &s.iovecs[0], Control: &s.control[0]}
	s.msg.SetIovlen(len(payloads))
	s.msg.SetControllen(unix.CmsgSpace(2))
	return nonblock.Sendmsg(fd, &s.msg)
}
