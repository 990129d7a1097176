package l2

import (
	"errors"
	"sync"
	"time"
)

// queueSize is how many bytes wait for a port at most, besides those that are being written: 4 ms at 2 Gbit/s.
const queueSize = 1 << 20

// queue is what waits to be written to a link. Whoever has frames writes them himself if nothing waits and they go without
// waiting; a goroutine writes the rest. So in an exchange of small messages no other goroutine need be woken, and nobody
// waits for a receiver that does not read.
type queue struct {
	link *Link
	wake chan struct{} // 1 deep: the writer has work

	mu      sync.Mutex
	pending []byte // in wire form
	share   []int  // bytes of it for each source
	busy    bool   // the writer has work: frames wait for it even if nothing is pending
	err     error  // ended

	room   chan struct{} // closed when there is; nil: nobody waits
	credit time.Duration // how long senders may still wait
}

func newQueue(l *Link, sources int) *queue {
	return &queue{link: l, wake: make(chan struct{}, 1), share: make([]int, sources)}
}

// sent is what became of frames that were to be sent.
type sent struct {
	frames, bytes uint64 // on their way; bytes as on the wire, without prefixes
	full          uint64 // frames for which there was no room
	unfit         uint64 // frames too long for the other end, or with a wrong Virtio
}

// send takes frames from one of the sources. They are the caller's again. With wait, it may wait for room as long as credit lasts.
func (q *queue) send(source int, frames []Frame, wait bool) (s sent) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range frames {
		if q.err != nil {
			s.full += uint64(len(frames) - i)
			return s
		}
		f := &frames[i]
		need, longest := wireLen(q.link.framing, q.link.takes, f)
		if !q.link.fits(f, longest) {
			s.unfit++
			continue
		}
		for wait && q.err == nil && !q.roomLocked(source, need) {
			wait = q.waitLocked()
		}
		if q.err != nil || !q.roomLocked(source, need) {
			s.full++
			continue
		}
		if !q.directLocked(source, f) {
			q.pending = appendFrame(q.pending, q.link.framing, q.link.takes, f)
			q.share[source] += need
		}
		s.frames++
		s.bytes += uint64(f.Len())
	}
	q.flushLocked()
	return s
}

// roomLocked tells whether a source may add some bytes. Each may have three times what is left: so one alone gets three quarters,
// two get three sevenths each, and there is always room for a newcomer (Choudhury and Hahne, Dynamic queue length
// thresholds, 1998).
func (q *queue) roomLocked(source, bytes int) bool {
	return q.share[source]+bytes <= 3*(queueSize-len(q.pending))
}

// Senders that wait for a receiver lose nothing, and go at its pace. But a receiver must not hold up others by reading slowly, so it
// has to have earned the wait by reading: at 100 MB/s senders may wait all the time, at 1 MB/s one hundredth of it, and for one that
// is stuck not at all.
const (
	creditPerByte = 10 * time.Nanosecond
	maxCredit     = 20 * time.Millisecond
)

// waitLocked waits for the writer to take what is pending, with q.mu unlocked meanwhile, and tells whether it did. What is
// pending is handed to it first, or nobody would write.
func (q *queue) waitLocked() bool {
	q.flushLocked()
	if q.credit <= 0 || !q.busy {
		return !q.busy
	}
	if q.room == nil {
		q.room = make(chan struct{})
	}
	room := q.room
	timer := time.NewTimer(q.credit)
	defer timer.Stop()
	start := time.Now()
	q.mu.Unlock()
	came := true
	select {
	case <-room:
	case <-timer.C:
		came = false
	}
	q.mu.Lock()
	q.credit -= time.Since(start)
	return came
}

// makeRoomLocked lets those go on who wait.
func (q *queue) makeRoomLocked() {
	if q.room != nil {
		close(q.room)
		q.room = nil
	}
}

// flushLocked writes what goes without waiting and leaves the rest to the writer.
func (q *queue) flushLocked() {
	if q.busy || len(q.pending) == 0 {
		return
	}
	q.wroteLocked(q.link.out.try(q.pending))
}

// wroteLocked takes note that n bytes of what is pending have been written, and leaves the rest, or the error, to the writer.
func (q *queue) wroteLocked(n int, err error) {
	q.earnLocked(n)
	q.pending = q.pending[:copy(q.pending, q.pending[n:])]
	if len(q.pending) == 0 && err == nil {
		clear(q.share)
		return
	}
	q.err = err
	q.busy = true
	q.wakeWriter()
}

// earnLocked is for n bytes that the receiver has room for.
func (q *queue) earnLocked(n int) {
	q.credit = min(q.credit+time.Duration(n)*creditPerByte, maxCredit)
}

// run is the writer. It ends with the error that the link ended with, errEnded from end.
func (q *queue) run() error {
	var spare []byte
	for {
		<-q.wake
		for {
			batch, err := q.next(spare)
			if err != nil {
				return err
			}
			if len(batch) == 0 {
				spare = spare[:0]
				break
			}
			if err := q.link.out.write(batch); err != nil {
				q.end(err)
				return err
			}
			spare = batch
		}
	}
}

// next returns what is to be written, and takes the memory of what has been. There is nothing if nothing is pending.
func (q *queue) next(spare []byte) ([]byte, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return nil, q.err
	}
	q.earnLocked(len(spare))
	q.makeRoomLocked()
	if len(q.pending) == 0 {
		q.busy = false
		return nil, nil
	}
	batch := q.pending
	q.pending = spare[:0]
	clear(q.share)
	return batch, nil
}

// errEnded is the error of a queue whose port has ended for a reason that others know.
var errEnded = errors.New("port has ended")

// end lets the writer end with err, and nothing more be sent.
func (q *queue) end(err error) {
	q.mu.Lock()
	if q.err == nil {
		q.err = err
	}
	q.makeRoomLocked()
	q.mu.Unlock()
	q.wakeWriter()
}

func (q *queue) wakeWriter() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// awaited returns a channel that is closed when the writer has taken what is pending, or the queue has ended.
func (q *queue) awaited() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil || !q.busy {
		return atOnce
	}
	if q.room == nil {
		q.room = make(chan struct{})
	}
	return q.room
}

// atOnce is closed.
var atOnce = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// wakeWaiting lets those go on who wait for room: what they wait with is no longer for this queue.
func (q *queue) wakeWaiting() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.makeRoomLocked()
}
