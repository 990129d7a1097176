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

// sockets makes sockets in a fabric, in advance. It is safe for concurrent use.
type sockets struct {
	maker socketMaker

	mu    sync.Mutex
	spare map[socketType][]int
}

type socketType struct{ family, kind int }

// take returns a new socket for addresses of a's family, which the caller closes.
func (s *sockets) take(kind int, a netip.Addr) (fd int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	of := socketType{familyOf(a), kind}
	spare := s.spare[of]
	if len(spare) == 0 {
		if spare, err = s.maker.sockets(kind, a, socketBatch); err != nil {
			return -1, err
		}
	}
	last := len(spare) - 1
	s.spare[of] = spare[:last]
	return spare[last], nil
}

// close closes those that nobody has taken.
func (s *sockets) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, spare := range s.spare {
		for _, fd := range spare {
			errs = append(errs, unix.Close(fd))
		}
	}
	clear(s.spare)
	return errors.Join(errs...)
}
