package usermode

import (
	"errors"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/splice"
)

// socketBatch is how many sockets are made at once. A thread has to go to the fabric and come back for it, which takes
// several times as long as the socket.
const socketBatch = 16

// sockets makes TCP sockets in a fabric, some of them in advance. It is safe for concurrent use.
type sockets struct {
	ns *netns.NS

	mu     sync.Mutex
	spare4 []int
	spare6 []int
}

// take returns a new socket for addresses of a's family, which the caller closes.
func (s *sockets) take(a netip.Addr) (fd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	spare := &s.spare4
	if a.Is6() {
		spare = &s.spare6
	}
	if len(*spare) == 0 {
		err = s.ns.Do(func() error {
			for range socketBatch {
				fd, err := splice.Socket(a)
				if err != nil {
					return err
				}
				*spare = append(*spare, fd)
			}
			return nil
		})
	}
	last := len(*spare) - 1
	if last < 0 {
		return -1, err
	}
	fd, *spare = (*spare)[last], (*spare)[:last]
	return fd, nil
}

// close closes those that nobody has taken.
func (s *sockets) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, fd := range append(s.spare4, s.spare6...) {
		errs = append(errs, unix.Close(fd))
	}
	s.spare4, s.spare6 = nil, nil
	return errors.Join(errs...)
}
