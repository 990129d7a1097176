package splice

import (
	"container/heap"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// workers are the process's threads, one for each processor. Each runs while it has something to wait for.
var workers = sync.OnceValue(func() []*worker {
	ws := make([]*worker, runtime.GOMAXPROCS(0))
	for i := range ws {
		ws[i] = newWorker()
	}
	return ws
})

// leastLoaded is the worker that waits for the fewest descriptors.
func leastLoaded() *worker {
	ws := workers()
	best := ws[0]
	for _, w := range ws[1:] {
		if w.load.Load() < best.load.Load() {
			best = w
		}
	}
	return best
}

// source is something that a worker watches descriptors for.
type source interface {
	ready(tag uint8, events uint32) // called by the worker; tag tells a source's descriptors apart
}

// unwatched is in place of the slot of a source that could not be watched, and that a closing group may yet cut.
const unwatched = -1

// slot is a descriptor under watch. Its number and generation travel with the event: a slot that was given back and
// taken again must not get the events of its former holder.
type slot struct {
	source source
	tag    uint8
	gen    int32
}

// worker is an epoll instance, and a goroutine that waits for it.
type worker struct {
	epoll, kick int          // kick is an eventfd that ends the wait
	load        atomic.Int64 // descriptors under watch

	mu      sync.Mutex
	running bool
	slots   []slot
	free    []int32
	posted  []func()
	timers  timers
	until   time.Time // when the wait will end; zero: not before something happens

	// Of the goroutine alone:
	events  [128]unix.EpollEvent
	busy    []*relay // have had their turn and could go on
	scratch [block]byte
	pipes   pipes
}

func newWorker() *worker {
	w := &worker{}
	var err error
	if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		panic(fmt.Sprintf("epoll_create1: %v", err)) // as the runtime does, which has needed one already
	}
	if w.kick, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		panic(fmt.Sprintf("eventfd2: %v", err))
	}
	// -1: not a slot.
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: -1}
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, w.kick, &e); err != nil {
		panic(fmt.Sprintf("epoll_ctl: %v", err))
	}
	return w
}

// startLocked sees to it that the goroutine runs.
func (w *worker) startLocked() {
	if !w.running {
		w.running = true
		go w.run()
	}
}

// enter makes m, which watch begins to watch, a member of g: both or none, as far as anybody else can see. ErrClosed: g
// takes nobody any more.
func (w *worker) enter(g *Group, m member, watch func(*worker) error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !g.join(m) {
		return ErrClosed
	}
	err := watch(w)
	if err != nil {
		g.leave(m)
	}
	return err
}

// watchLocked has s called when fd is ready for one of events. It fills in the slot's number before anything can happen.
func (w *worker) watchLocked(fd int, events uint32, s source, tag uint8, at *int32) error {
	n := int32(len(w.slots))
	if last := len(w.free) - 1; last >= 0 {
		n = w.free[last]
	}
	gen := int32(0)
	if int(n) < len(w.slots) {
		gen = w.slots[n].gen
	}
	if err := w.ctl(unix.EPOLL_CTL_ADD, fd, events, n, gen); err != nil {
		return err
	}
	if int(n) < len(w.slots) {
		w.free = w.free[:len(w.free)-1]
	} else {
		w.slots = append(w.slots, slot{})
	}
	w.slots[n].source, w.slots[n].tag = s, tag
	w.load.Add(1)
	*at = n
	w.startLocked()
	return nil
}

// change waits for other events from now on.
func (w *worker) change(n int32, fd int, events uint32) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ctl(unix.EPOLL_CTL_MOD, fd, events, n, w.slots[n].gen)
}

// unwatchLocked gives the slot back. Closing the descriptor does the rest; one that stays open is to be taken out first.
func (w *worker) unwatchLocked(n int32) {
	w.slots[n].source = nil
	w.slots[n].gen++
	w.free = append(w.free, n)
	w.load.Add(-1)
}

func (w *worker) ctl(op, fd int, events uint32, n, gen int32) error {
	e := unix.EpollEvent{Events: events, Fd: n, Pad: gen}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(w.epoll, op, fd, &e))
}

// post has the worker call f.
func (w *worker) post(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.postLocked(f)
}

func (w *worker) postLocked(f func()) {
	w.posted = append(w.posted, f)
	w.startLocked()
	w.wake()
}

func (w *worker) wake() {
	one := [8]byte{1} // any number but 0
	unix.Write(w.kick, one[:])
}

// run serves until there is nothing left to wait for.
func (w *worker) run() {
	for {
		timeout, ok := w.prepare()
		if !ok {
			return
		}
		n, err := unix.EpollWait(w.epoll, w.events[:], timeout)
		if err != nil && err != unix.EINTR {
			panic(fmt.Sprintf("epoll_wait: %v", err))
		}
		for _, e := range w.events[:max(n, 0)] {
			if s, tag := w.find(e); s != nil {
				s.ready(tag, e.Events)
			}
		}
		w.takeTurns()
		w.takePosted()
		w.expire()
	}
}

// prepare says how many milliseconds to wait for events (-1: for ever), or that there is nothing to wait for.
func (w *worker) prepare() (timeout int, ok bool) {
	trim := w.pipes.trim()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.posted) > 0 || len(w.busy) > 0 {
		return 0, true
	}
	if w.load.Load() == 0 && len(w.timers) == 0 {
		w.running = false
		w.pipes.close()
		return 0, false
	}
	w.until = trim
	if len(w.timers) > 0 && (trim.IsZero() || w.timers[0].at.Before(trim)) {
		w.until = w.timers[0].at
	}
	if w.until.IsZero() {
		return -1, true
	}
	// Rounded up: an end that has not come yet would be waited for in vain.
	return max(int((time.Until(w.until)+time.Millisecond-1)/time.Millisecond), 0), true
}

// find is whom an event is for; nil: nobody any more.
func (w *worker) find(e unix.EpollEvent) (source, uint8) {
	if e.Fd < 0 {
		return nil, 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &w.slots[e.Fd]
	if s.gen != e.Pad {
		return nil, 0
	}
	return s.source, s.tag
}

// takeTurns gives each relay that has more to move another turn.
func (w *worker) takeTurns() {
	turn := len(w.busy)
	for i := range turn {
		r := w.busy[i]
		w.busy[i] = nil
		r.queued = false
		r.run()
	}
	w.busy = append(w.busy[:0], w.busy[turn:]...)
}

func (w *worker) takePosted() {
	w.mu.Lock()
	posted := w.posted
	w.posted = nil
	w.mu.Unlock()
	for _, f := range posted {
		f()
	}
}

// timer is a call that is due. It belongs to one worker.
type timer struct {
	at    time.Time
	f     func()
	index int // in timers; -1: not any more
}

// scheduleLocked has the worker call f at the time at.
func (w *worker) scheduleLocked(at time.Time, f func()) *timer {
	t := &timer{at: at, f: f}
	heap.Push(&w.timers, t)
	w.startLocked()
	if w.until.IsZero() || at.Before(w.until) {
		w.wake()
	}
	return t
}

// unscheduleLocked takes a call back that has not been made.
func (w *worker) unscheduleLocked(t *timer) {
	if t.index >= 0 {
		heap.Remove(&w.timers, t.index)
	}
}

// expire makes the calls that are due.
func (w *worker) expire() {
	for {
		w.mu.Lock()
		if len(w.timers) == 0 || time.Now().Before(w.timers[0].at) {
			w.mu.Unlock()
			return
		}
		t := heap.Pop(&w.timers).(*timer)
		w.mu.Unlock()
		t.f()
	}
}

// timers is a heap, the next one first.
type timers []*timer

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at.Before(t[j].at) }
func (t timers) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].index, t[j].index = i, j
}
func (t *timers) Push(x any) {
	x.(*timer).index = len(*t)
	*t = append(*t, x.(*timer))
}
func (t *timers) Pop() any {
	old := *t
	x := old[len(old)-1]
	old[len(old)-1] = nil
	*t = old[:len(old)-1]
	x.index = -1
	return x
}
