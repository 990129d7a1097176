package splice

import (
	"time"

	"golang.org/x/sys/unix"
)

// Watcher waits for its owner's descriptors, which may be of any kind, and for a time, all in one thread: what the
// functions that it calls share needs no lock. Its methods are for those functions alone.
type Watcher struct {
	group  *Group
	worker *worker
	end    func()
	alarm  *timer // nil: none is set
	closed bool
}

// Watch is one descriptor that a Watcher waits for.
type Watch struct {
	fd       int
	slot     int32
	readable func()
}

// Watch has a new Watcher's thread call begin, and end when the group is closed, which stops the Watcher's alarm, and is
// to remove what it waits for. If the group has been closed already, neither is called.
func (g *Group) Watch(begin func(*Watcher), end func()) {
	w := &Watcher{group: g, worker: leastLoaded(), end: end}
	w.worker.enter(g, w, func(t *worker) error {
		t.postLocked(func() { begin(w) })
		return nil
	})
}

// Add has readable called whenever fd can be read from or has an error, until Remove. As long as it is not read, that is
// again and again.
func (w *Watcher) Add(fd int, readable func()) (*Watch, error) {
	x := &Watch{fd: fd, readable: readable}
	w.worker.mu.Lock()
	defer w.worker.mu.Unlock()
	if err := w.worker.watchLocked(fd, unix.EPOLLIN, x, 0, &x.slot); err != nil {
		return nil, err
	}
	return x, nil
}

// Remove ends what Add began. The descriptor is still open then.
func (w *Watcher) Remove(x *Watch) {
	unix.EpollCtl(w.worker.epoll, unix.EPOLL_CTL_DEL, x.fd, nil)
	w.worker.mu.Lock()
	defer w.worker.mu.Unlock()
	w.worker.unwatchLocked(x.slot)
}

// Alarm has f called when d has passed, and what was set before is forgotten.
func (w *Watcher) Alarm(d time.Duration, f func()) {
	w.worker.mu.Lock()
	defer w.worker.mu.Unlock()
	w.silenceLocked()
	w.alarm = w.worker.scheduleLocked(time.Now().Add(d), f)
}

func (w *Watcher) silenceLocked() {
	if w.alarm != nil {
		w.worker.unscheduleLocked(w.alarm)
		w.alarm = nil
	}
}

func (x *Watch) ready(uint8, uint32) { x.readable() }

func (w *Watcher) servedBy() *worker { return w.worker }

func (w *Watcher) cut() {
	if w.closed {
		return
	}
	w.closed = true
	w.end()
	w.worker.mu.Lock()
	w.silenceLocked()
	w.worker.mu.Unlock()
	w.group.leave(w)
}
