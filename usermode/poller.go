package usermode

import (
	"encoding/binary"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// poller waits for the TUN and for the sockets of UDP flows and echo requests, all in one epoll(7) set: the goroutine
// that receives from the TUN serves them while the TUN has nothing. So a datagram is carried on by the thread that was
// woken for it, and nothing of flows needs a lock. (One goroutine for each flow, in the runtime's poller, needs half as
// much CPU again for an exchange: the runtime wakes one thread to look for work and another to do it.)
//
// Its methods belong to that goroutine, except stop and, after it has gone, close.
type poller struct {
	epoll, wakeup int // descriptors
	watchesTUN    bool
	events        [64]unix.EpollEvent
	sockets       []watched
	free          []int32 // unused places in sockets

	// due is called when the time that it returned last has passed, and soon after an add.
	due  func(now time.Time) (again time.Duration)
	next time.Time
	// idle is called when the TUN has nothing more to read, and before sockets are served.
	idle    func()
	stopped atomic.Bool

	mu sync.Mutex // between stop and close, for wakeup
}

// pollable is a socket that the poller waits for.
type pollable interface {
	// ready is called when something can be received, or an error be asked for. It does not wait.
	ready()
}

// watched is one place in the poller's table. The generation keeps an event that was about an earlier socket from
// being taken for one of the socket that has its place now.
type watched struct {
	socket     pollable
	generation int32
}

// What stands in an event in place of a place.
const (
	placeTUN    = -1
	placeWakeup = -2
)

// dueAfterAdd spares due from being called for each of many sockets.
const dueAfterAdd = time.Second

// never is a long time to wait.
const never = time.Duration(1<<63 - 1)

func newPoller() (_ *poller, err error) {
	p := &poller{epoll: -1, wakeup: -1}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if p.wakeup, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return p, p.watch(p.wakeup, placeWakeup, 0)
}

func (p *poller) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, fd := range []*int{&p.epoll, &p.wakeup} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// stop makes wait return false, now and ever after. It may be called at any time, and again.
func (p *poller) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped.Store(true)
	if p.wakeup >= 0 {
		unix.Write(p.wakeup, binary.NativeEndian.AppendUint64(nil, 1))
	}
}

func (p *poller) watch(fd int, place, generation int32) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: place, Pad: generation}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &ev))
}

// add waits for fd, which must be non-blocking, on behalf of s. The place that it returns is for remove.
func (p *poller) add(fd int, s pollable) (place int32, err error) {
	if n := len(p.free); n > 0 {
		place = p.free[n-1]
		p.free = p.free[:n-1]
	} else {
		place = int32(len(p.sockets))
		p.sockets = append(p.sockets, watched{})
	}
	w := &p.sockets[place]
	if err := p.watch(fd, place, w.generation); err != nil {
		p.free = append(p.free, place)
		return 0, err
	}
	w.socket = s
	if soon := time.Now().Add(dueAfterAdd); p.next.After(soon) {
		p.next = soon
	}
	return place, nil
}

// remove ends what add began. The socket must be closed then: that is what takes it out of the epoll set.
func (p *poller) remove(place int32) {
	w := &p.sockets[place]
	w.socket = nil
	w.generation++
	p.free = append(p.free, place)
}

// wait serves sockets until tun, which is always the same, has something to read. When stop was called it returns
// os.ErrDeadlineExceeded.
func (p *poller) wait(tun int) error {
	if !p.watchesTUN {
		if err := p.watch(tun, placeTUN, 0); err != nil {
			return err
		}
		p.watchesTUN = true
	}
	for {
		readable, err := p.poll(p.timeout())
		if readable || err != nil {
			return err
		}
	}
}

// glance serves the sockets that are ready, and does not wait for any.
func (p *poller) glance() { p.poll(0) }

// timeout is how long to wait, in milliseconds; -1: for ever.
func (p *poller) timeout() int {
	if p.due == nil {
		return -1
	}
	now := time.Now()
	if !now.Before(p.next) {
		again := p.due(now)
		if again == never {
			p.next = now.Add(24 * time.Hour)
			return -1
		}
		p.next = now.Add(again)
	}
	return int(min(p.next.Sub(now), time.Hour).Milliseconds()) + 1
}

func (p *poller) poll(timeout int) (readable bool, err error) {
	if p.idle != nil {
		p.idle()
	}
	var n int
	if timeout == 0 {
		n, err = nonblock.EpollReady(p.epoll, p.events[:])
	} else {
		n, err = unix.EpollWait(p.epoll, p.events[:], timeout)
	}
	if err == unix.EINTR {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("epoll_wait", err)
	}
	for _, ev := range p.events[:n] {
		switch ev.Fd {
		case placeTUN:
			readable = true
		case placeWakeup:
			err = os.ErrDeadlineExceeded
		default:
			if w := p.sockets[ev.Fd]; w.socket != nil && w.generation == ev.Pad {
				w.socket.ready()
			}
		}
	}
	return readable, err
}
