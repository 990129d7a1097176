// Package splice serves TCP connections by a few threads, one for each processor: it accepts them, waits for those that
// are being made, and joins two into one, in the kernel as far as it goes (splice(2)). It does not know where
// connections lead; whoever serves them dials. For descriptors of other kinds it only waits (Group.Watch).
//
// It works on bare descriptors of non-blocking sockets and waits for them by epoll(7) itself. With a goroutine for
// each direction, the runtime's poller wakes one thread that wakes another, and on a machine whose processors are busy
// with the two ends of the connection every wake-up shows in the round trip. Here what arrives at one end leaves by
// the other in the thread that was woken, and an idle connection is a few hundred bytes.
package splice

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrClosed is what a connection that is being made comes to when its group is closed.
var ErrClosed = errors.New("no connections are made any more")

// Group is a number of listeners and connections that end together. The zero value is ready for use. Functions that are
// handed in are called by the threads that serve everybody: they must not wait for anything.
type Group struct {
	mu      sync.Mutex
	closed  bool
	members map[member]struct{}
	present sync.WaitGroup
}

// member is what ends with its group.
type member interface {
	cut()              // called by the worker: the group is closed; nothing, if the member has ended already
	servedBy() *worker // may be called by anyone
}

// join takes one more member, unless the group was closed.
func (g *Group) join(m member) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	if g.members == nil {
		g.members = make(map[member]struct{})
	}
	g.members[m] = struct{}{}
	g.present.Add(1)
	return true
}

// leave is a member's last word.
func (g *Group) leave(m member) {
	g.mu.Lock()
	delete(g.members, m)
	g.mu.Unlock()
	g.present.Done()
}

// Close ends everything in the group and returns when it has ended. A peer of a connection that this cuts short gets a
// reset, not an end of stream. It must not be called by a function that was handed in. Closing again is no error.
func (g *Group) Close() {
	g.mu.Lock()
	g.closed = true
	cut := make(map[*worker][]member)
	for m := range g.members {
		cut[m.servedBy()] = append(cut[m.servedBy()], m)
	}
	g.mu.Unlock()
	for w, members := range cut {
		w.post(func() {
			for _, m := range members {
				m.cut()
			}
		})
	}
	g.present.Wait()
}

// Serve calls serve for every connection that the listening socket fd accepts, until the group is closed; serve owns the
// connection. The caller keeps fd, and closes it after the group.
func (g *Group) Serve(fd int, log *slog.Logger, serve func(conn int, peer netip.AddrPort)) {
	g.serve(&listener{fd: fd, log: log, accepted: serve, events: unix.EPOLLIN})
}

// ServeOnDemand is Serve for somebody who knows when a connection is about to come, and accepts most of them on the
// spot: the thread is not woken but between expect(true) and expect(false).
func (g *Group) ServeOnDemand(fd int, log *slog.Logger, serve func(conn int, peer netip.AddrPort)) (expect func(bool)) {
	l := &listener{fd: fd, log: log, accepted: serve}
	if !g.serve(l) {
		return func(bool) {}
	}
	return l.expect
}

func (g *Group) serve(l *listener) bool {
	l.group, l.worker, l.slot = g, leastLoaded(), unwatched
	err := l.worker.enter(g, l, func(w *worker) error {
		return w.watchLocked(l.fd, l.events, l, 0, &l.slot)
	})
	if err != nil && err != ErrClosed {
		l.log.Error("nobody accepts connections", "err", err)
	}
	return err == nil
}

// Connect calls done when the connection of fd, on which connect(2) was called, stands (nil), has failed, or has taken
// longer than limit (os.ErrDeadlineExceeded). If that is known already, done is called before Connect returns. fd stays
// the caller's.
func (g *Group) Connect(fd int, limit time.Duration, done func(error)) {
	if decided, err := connected(fd); decided {
		done(err)
		return
	}
	a := &attempt{group: g, worker: leastLoaded(), fd: fd, slot: unwatched, done: done}
	err := a.worker.enter(g, a, func(w *worker) error {
		if err := w.watchLocked(fd, unix.EPOLLOUT, a, 0, &a.slot); err != nil {
			return err
		}
		a.timer = w.scheduleLocked(time.Now().Add(limit), func() { a.end(os.ErrDeadlineExceeded) })
		return nil
	})
	if err != nil {
		done(err)
	}
}

// Join copies both ways between two connections until both directions have ended or the group has, and then calls done,
// which may be nil. It owns both from now on, and closes them before done. The one that was sent less than the other
// had for it is reset, so that its peer cannot take the cut for the end.
func (g *Group) Join(a, b int, done func()) {
	r := &relay{group: g, worker: leastLoaded(), done: done}
	r.ends[0], r.ends[1] = end{fd: a, slot: unwatched}, end{fd: b, slot: unwatched}
	if r.worker.enter(g, r, r.watchLocked) != nil {
		r.refuse()
	}
}

// Refuse ends a connection that nobody serves with a reset. One that was kept would cost a descriptor for as long as
// the client likes.
func Refuse(fd int) {
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}

// Pause is the wait after a failed accept or read: a lack of descriptors or memory passes, and trying at once again
// would only add to it. The zero value is ready for use.
type Pause struct{ next time.Duration }

const shortestPause, longestPause = 5 * time.Millisecond, time.Second

// First reports whether there was no failure before this one.
func (p *Pause) First() bool { return p.next == 0 }

// Reset is called after a success.
func (p *Pause) Reset() { p.next = 0 }

// Next is how long to wait now: each time twice as long.
func (p *Pause) Next() time.Duration {
	p.next = min(max(2*p.next, shortestPause), longestPause)
	return p.next
}
