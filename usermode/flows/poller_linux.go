package flows

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// maxPollers is how many goroutines receive, at most.
const maxPollers = 4

// pollers wait for the sockets of flows, each in an epoll(7) set of its own, which the runtime's poller has in its turn: a
// goroutine that waits in epoll_wait itself is some 70 µs late, since the runtime takes its processor away. The runtime's
// alone, with a goroutine for each flow, takes several times the memory, and watches for room to write as well, which a
// UDP socket has again after every datagram.
type pollers struct {
	all  []*poller
	next atomic.Uint32
}

// receiver is a socket that a poller waits for.
type receiver interface {
	// receive takes what has come, without waiting. It may be called for nothing. It returns true to be called again
	// before anything new comes.
	receive(in *inbox) (more bool)
}

// poller is one goroutine that receives.
type poller struct {
	raw   syscall.RawConn // of file
	ready []receiver
	again []receiver // have more

	mu      sync.Mutex
	file    *os.File // nil: closed
	epoll   int      // its descriptor
	sockets []receiver
	free    []int32 // unused places in sockets
}

func (p *pollers) open(f *Flows) error {
	for range min(runtime.GOMAXPROCS(0), maxPollers) {
		one, err := newPoller()
		if err != nil {
			return errors.Join(err, p.close())
		}
		p.all = append(p.all, one)
	}
	for _, one := range p.all {
		f.tasks.Go(one.serve)
	}
	return nil
}

// close ends the goroutines.
func (p *pollers) close() error {
	var errs []error
	for _, one := range p.all {
		errs = append(errs, one.close())
	}
	return errors.Join(errs...)
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // has package os wait for it
		unix.Close(fd)
		return nil, os.NewSyscallError("set O_NONBLOCK", err)
	}
	p := &poller{epoll: fd, file: os.NewFile(uintptr(fd), "epoll")}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, p.file.Close())
	}
	return p, nil
}

// close makes serve end, and waits until it has: not with the lock, which serve needs.
func (p *poller) close() error {
	p.mu.Lock()
	file := p.file
	p.file = nil
	p.mu.Unlock()
	if file == nil {
		return nil
	}
	return file.Close()
}

// control has epoll tell once of whatever comes.
func (p *poller) control(fd int, place int32) error {
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: place}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &e))
}

// watched is a descriptor that one of the pollers waits for. Its owner holds it while it uses it, so that it is not
// closed, and its number another's, meanwhile.
type watched struct {
	fd   int
	refs atomic.Int32 // one is the owner's, until close

	poller *poller // nil: not yet
	place  int32
	closed bool // under the poller's lock
}

func (w *watched) init(p *pollers, fd int) {
	w.fd = fd
	w.refs.Store(1)
	w.poller = p.all[p.next.Add(1)%uint32(len(p.all))]
	w.place = -1
}

// watch has r receive what comes by the descriptor.
func (w *watched) watch(r receiver) error {
	if !w.hold() {
		return errEnded
	}
	defer w.release()
	p := w.poller
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.closed || p.file == nil {
		return errEnded
	}
	if n := len(p.free); n > 0 {
		w.place, p.free = p.free[n-1], p.free[:n-1]
		p.sockets[w.place] = r
	} else {
		w.place, p.sockets = int32(len(p.sockets)), append(p.sockets, r)
	}
	return p.control(w.fd, w.place)
}

// hold keeps the descriptor open until release; false: it is closed.
func (w *watched) hold() bool {
	for {
		n := w.refs.Load()
		if n == 0 {
			return false
		}
		if w.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (w *watched) release() {
	if w.refs.Add(-1) == 0 {
		unix.Close(w.fd)
	}
}

// close closes the descriptor as soon as nobody holds it. It must be called once.
func (w *watched) close() {
	p := w.poller
	p.mu.Lock()
	w.closed = true
	if w.place >= 0 {
		// An event may be under way, and find another's socket here: that is asked for nothing.
		p.sockets[w.place] = nil
		p.free = append(p.free, w.place)
	}
	p.mu.Unlock()
	w.release()
}

// serve has sockets receive until close is called.
func (p *poller) serve() {
	in := newInbox()
	var events [64]unix.EpollEvent
	p.raw.Read(func(epoll uintptr) bool {
		for {
			n, _ := nonblock.EpollReady(int(epoll), events[:])
			p.serveReady(events[:n], in)
			if n < len(events) && len(p.again) == 0 {
				return false // whatever comes from now on wakes us
			}
		}
	})
}

// serveReady serves the sockets that events are about, and those that had more.
func (p *poller) serveReady(events []unix.EpollEvent, in *inbox) {
	p.ready, p.again = append(p.ready[:0], p.again...), p.again[:0]
	p.mu.Lock()
	for _, e := range events {
		if r := p.sockets[e.Fd]; r != nil {
			p.ready = append(p.ready, r)
		}
	}
	p.mu.Unlock()
	for i, r := range p.ready {
		if r.receive(in) {
			p.again = append(p.again, r)
		}
		p.ready[i] = nil
	}
}
