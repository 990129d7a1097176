package usermode

import (
	"errors"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/splice"
)

// socketBatch is how many sockets are made at once. A thread has to go to the fabric and come back for it, which takes
// several times as long as the socket.
const socketBatch = 16

// socketMaker makes non-blocking sockets in a fabric, n of them or fewer: SOCK_STREAM ones as splice.Socket does, or
// SOCK_DGRAM. They are for addresses of a's family. There is an error only if there is no socket.
type socketMaker interface {
	sockets(kind int, a netip.Addr, n int) ([]int, error)
}

// entered is the socketMaker for a fabric that this process may enter.
type entered struct{ ns *netns.NS }

func (e entered) sockets(kind int, a netip.Addr, n int) (fds []int, err error) {
	err = e.ns.Do(func() (err error) {
		fds, err = makeSockets(kind, a, n)
		return err
	})
	return fds, err
}

func makeSockets(kind int, a netip.Addr, n int) (fds []int, err error) {
	for range n {
		var fd int
		if kind == unix.SOCK_STREAM {
			fd, err = splice.Socket(a)
		} else {
			fd, err = unix.Socket(familyOf(a), kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			err = os.NewSyscallError("socket", err)
		}
		if err != nil {
			break
		}
		fds = append(fds, fd)
	}
	if len(fds) > 0 {
		return fds, nil
	}
	return nil, err
}

// sockets makes sockets in a fabric, TCP ones in advance. It is safe for concurrent use.
type sockets struct {
	maker socketMaker

	mu     sync.Mutex
	spare4 []int
	spare6 []int
}

// take returns a new socket for addresses of a's family, which the caller closes.
func (s *sockets) take(kind int, a netip.Addr) (fd int, err error) {
	if kind != unix.SOCK_STREAM {
		fds, err := s.maker.sockets(kind, a, 1)
		if err != nil {
			return -1, err
		}
		return fds[0], nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	spare := &s.spare4
	if a.Is6() {
		spare = &s.spare6
	}
	if len(*spare) == 0 {
		if *spare, err = s.maker.sockets(kind, a, socketBatch); err != nil {
			return -1, err
		}
	}
	last := len(*spare) - 1
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
