//go:build unix

package forward

import (
	"errors"
	"sync"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// noFamily are how the system says that it does without a family.
var noFamily = []error{unix.EAFNOSUPPORT, unix.EADDRNOTAVAIL}

// read waits for datagrams and reads them into a batch of the pool, where the caller puts it back. None is held while there are
// no datagrams.
func (s *socket) read(batches *sync.Pool) (*batch, int, error) {
	for {
		if s.drained {
			if err := s.raw.Read(readable); err != nil {
				return nil, 0, err
			}
		}
		b := batches.Get().(*batch)
		n, err := ipv4.NewPacketConn(s.UDPConn).ReadBatch(b.messages, unix.MSG_DONTWAIT)
		s.drained = err != nil || n < len(b.messages)
		if err == nil {
			return b, n, nil
		}
		batches.Put(b)
		if !errors.Is(err, unix.EAGAIN) {
			return nil, 0, err
		}
	}
}

// readable tells whether a read would not wait.
func readable(fd uintptr) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n != 0 && !errors.Is(err, unix.EINTR)
}
