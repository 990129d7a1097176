package nonblock

import (
	"encoding/binary"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxSegments is how many datagrams one call takes with UDP_SEGMENT: UDP_MAX_SEGMENTS in linux/udp.h. They must not have more bytes together
// than one packet.
const MaxSegments = 64

// CutsDatagrams tells whether the kernel has UDP_SEGMENT (Linux 4.18, see udp(7)). One without it would send a burst as a single
// datagram.
var CutsDatagrams = sync.OnceValue(func() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, err = unix.GetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT)
	return err == nil
})

// Segments are the arguments of a sendmsg(2) with several datagrams, which the kernel takes through all of its layers as one, and cuts at
// the end of its own way, or where they are received.
type Segments struct {
	control [unix.SizeofCmsghdr + 8]byte
	msg     unix.Msghdr
}

// Send sends datagrams of size bytes, the last of which may be shorter, on a connected socket: all of them or none. CutsDatagrams
// must be true.
func (s *Segments) Send(fd int, data []unix.Iovec, size int) error {
	c := (*unix.Cmsghdr)(unsafe.Pointer(&s.control))
	c.Level, c.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	c.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(s.control[unix.CmsgLen(0):], uint16(size))
	s.msg = unix.Msghdr{Iov: &data[0], Control: &s.control[0]}
	s.msg.SetIovlen(len(data))
	s.msg.SetControllen(unix.CmsgSpace(2))
	return Sendmsg(fd, &s.msg)
}
