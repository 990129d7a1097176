package splice

import (
	"os"

	"golang.org/x/sys/unix"
)

// attempt is a connection that is being made.
type attempt struct {
	group  *Group
	worker *worker
	fd     int
	slot   int32
	timer  *timer
	done   func(error)
	ended  bool
}

func (a *attempt) servedBy() *worker { return a.worker }

func (a *attempt) cut() {
	if !a.ended && a.slot >= 0 {
		a.end(ErrClosed)
	}
}

func (a *attempt) ready(uint8, uint32) {
	if decided, err := connected(a.fd); decided {
		a.end(err)
	}
}

// end stops watching and tells the result.
func (a *attempt) end(err error) {
	a.ended = true
	w := a.worker
	// The descriptor stays open and is going to be watched for something else.
	unix.EpollCtl(w.epoll, unix.EPOLL_CTL_DEL, a.fd, nil)
	w.mu.Lock()
	w.unwatchLocked(a.slot)
	w.unscheduleLocked(a.timer)
	w.mu.Unlock()
	a.done(err)
	a.group.leave(a)
}

// connected tells whether the outcome of a connect(2) is known, and what it is.
func connected(fd int) (decided bool, _ error) {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(p[:], 0)
	if err == unix.EINTR {
		return false, nil // and the next event, or the caller's watch, will tell
	}
	if err != nil {
		return true, os.NewSyscallError("poll", err)
	}
	if n == 0 {
		return false, nil
	}
	if p[0].Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) == 0 {
		return true, nil
	}
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		return true, os.NewSyscallError("get SO_ERROR", err)
	case errno != 0:
		return true, os.NewSyscallError("connect", unix.Errno(errno))
	}
	return true, nil // it stood, and has ended already: whoever reads will see
}
