package splice

import (
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// block is how many bytes are worth a pipe: less is read and written, which takes as many system calls.
	block = 16 << 10
	// quantum is how many bytes one direction moves before others have a turn.
	quantum = 1 << 20

	inputs = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET
)

var blocks = sync.Pool{New: func() any { return new([block]byte) }}

// relay is two connections that have been joined. Its worker's goroutine alone touches it.
type relay struct {
	group  *Group
	worker *worker
	done   func()
	ends   [2]end
	queued bool // in the worker's busy list
	closed bool
}

// end is one of the two connections, and what was read from it.
type end struct {
	fd   int
	slot int32

	readable bool // as far as is known, there is something to read
	hungUp   bool // there is: the end of the stream, or an error
	full     bool // takes nothing more at present
	waits    bool // is watched for taking more
	eof      bool // was read to its end
	shut     bool // was told that nothing more will come
	broken   bool // what is sent to it gets nowhere

	// What was read and the other end has not taken yet: in a pipe, or in a block. Neither is held while there is nothing.
	pipe  *pipe
	block *[block]byte
	rest  []byte // of block
	bulk  bool   // the last read was a full one: go on with a pipe
}

// watchLocked begins to serve the relay.
func (r *relay) watchLocked(w *worker) error {
	for i := range r.ends {
		e := &r.ends[i]
		if err := w.watchLocked(e.fd, inputs, r, uint8(i), &e.slot); err != nil {
			if i == 1 {
				unix.EpollCtl(w.epoll, unix.EPOLL_CTL_DEL, r.ends[0].fd, nil)
				w.unwatchLocked(r.ends[0].slot)
				r.ends[0].slot = unwatched
			}
			return err
		}
	}
	return nil
}

// refuse is for a relay that is not served: nobody can be told more than that.
func (r *relay) refuse() {
	Refuse(r.ends[0].fd)
	Refuse(r.ends[1].fd)
	if r.done != nil {
		r.done()
	}
}

func (r *relay) servedBy() *worker { return r.worker }

func (r *relay) cut() {
	if r.ends[0].slot >= 0 {
		r.finish(true)
	}
}

// ready notes what has become possible, and does it.
func (r *relay) ready(tag uint8, events uint32) {
	e := &r.ends[tag]
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.readable = true
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.hungUp = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.full = false
	}
	if events&unix.EPOLLERR != 0 && e.eof {
		e.broken = true // a reset after the end of the stream: nothing else would find it
	}
	if !r.queued { // or it has its turn anyway
		r.run()
	}
}

// run moves what can be moved, in both directions, and ends the relay when nothing will come any more.
func (r *relay) run() {
	if r.closed {
		return
	}
	a, b := &r.ends[0], &r.ends[1]
	moreUp, okUp := r.move(a, b)
	moreDown, okDown := r.move(b, a)
	switch {
	case !okUp || !okDown || a.broken && b.broken:
		r.finish(true)
	case a.ended() && b.ended():
		r.finish(false)
	case moreUp || moreDown || a.cornered(b) || b.cornered(a):
		r.queued = true
		r.worker.busy = append(r.worker.busy, r)
	}
}

// ended tells whether all of e has been passed on.
func (e *end) ended() bool { return e.eof && e.pending() == 0 }

// cornered tells whether e is gone and what it said before can be passed on to other now. It may be the turn's second
// half that has found out, and no event is going to say so.
func (e *end) cornered(other *end) bool {
	return e.broken && (e.readable || e.eof) && (e.pending() == 0 || !other.full)
}

// pending is how many bytes were read and not taken.
func (e *end) pending() int {
	if e.pipe != nil {
		return e.pipe.n
	}
	return len(e.rest)
}

// move carries from from to to what there is and fits, within the quantum; more: it could go on. Not ok: the connection
// of from is gone, and all that it said has been delivered.
//
// When to is gone, from is not read any more. What to said before is still delivered by the opposite direction, which
// will find the end of it.
func (r *relay) move(from, to *end) (more, ok bool) {
	for budget := quantum; budget > 0; {
		switch {
		case to.broken:
			r.letGo(from)
			return false, true
		case from.pending() > 0:
			if to.full {
				return false, true
			}
			budget -= r.push(from, to)
			continue
		}
		r.letGo(from)
		if from.eof {
			// The kernel reports a reset once: when a write got it, what is read after it looks like an end.
			if !from.broken && !to.shut {
				to.shut = true
				r.wrote(to, unix.Shutdown(to.fd, unix.SHUT_WR))
			}
			return false, !from.broken
		}
		if !from.readable {
			return false, true
		}
		n, err := r.pull(from, to)
		if err == io.EOF {
			from.eof = true
		} else if err != nil {
			return false, false
		}
		budget -= n
	}
	return true, true
}

// pull reads what from has, and writes it to to at once if it is little and fits; it returns how much was written.
func (r *relay) pull(from, to *end) (written int, err error) {
	if from.bulk {
		if from.pipe = r.worker.pipes.get(); from.pipe != nil {
			return 0, from.splice()
		}
	}
	b := r.worker.scratch[:]
	n, err := retry(func() (int, error) { return unix.Read(from.fd, b) })
	switch {
	case err == unix.EAGAIN:
		from.readable, from.bulk = false, false
		return 0, nil
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	from.bulk = n == len(b)
	// Less than was asked for is all that there was, and what comes next is an event.
	from.readable = from.bulk || from.hungUp
	if !to.full {
		written = r.write(to, b[:n])
	}
	if written < n && !to.broken {
		from.block = blocks.Get().(*[block]byte)
		from.rest = from.block[:copy(from.block[:], b[written:n])]
	}
	return written, nil
}

// splice moves what e has into its pipe.
func (e *end) splice() error {
	n, err := retry(func() (int, error) {
		n, err := unix.Splice(e.fd, nil, e.pipe.w, nil, pipeSize, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		return int(n), err
	})
	switch {
	case err == unix.EAGAIN: // the pipe is empty: it is the socket that has nothing
		e.readable, e.bulk = false, false
		return nil
	case err != nil:
		return err
	case n == 0:
		return io.EOF
	}
	e.pipe.n = n
	e.bulk = n >= block
	return nil
}

// push gives to what from has pending, and returns how much of it that was.
func (r *relay) push(from, to *end) int {
	if from.pipe == nil {
		n := r.write(to, from.rest)
		from.rest = from.rest[n:]
		return n
	}
	n, err := retry(func() (int, error) {
		n, err := unix.Splice(from.pipe.r, nil, to.fd, nil, from.pipe.n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		return int(n), err
	})
	n = max(n, 0)
	from.pipe.n -= n
	r.wrote(to, err)
	return n
}

// write writes to to and returns how much that was.
func (r *relay) write(to *end, b []byte) int {
	n, err := retry(func() (int, error) { return unix.Write(to.fd, b) })
	r.wrote(to, err)
	return max(n, 0)
}

// wrote looks at the result of a write to to.
func (r *relay) wrote(to *end, err error) {
	switch err {
	case nil:
	case unix.EAGAIN:
		to.full = true
		if !to.waits {
			to.waits = true
			// If it has made room meanwhile, that is an event now.
			to.broken = r.worker.change(to.slot, to.fd, inputs|unix.EPOLLOUT) != nil
		}
	default:
		to.broken = true
		to.readable, to.hungUp = true, true // what it said before is to be read, and may have no event of its own
	}
}

// letGo gives back what held pending data.
func (r *relay) letGo(e *end) {
	if e.pipe != nil {
		r.worker.pipes.put(e.pipe)
		e.pipe = nil
	}
	if e.block != nil {
		blocks.Put(e.block)
		e.block, e.rest = nil, nil
	}
}

// finish closes both ends.
func (r *relay) finish(reset bool) {
	if r.closed {
		return
	}
	r.closed = true
	for i := range r.ends {
		e := &r.ends[i]
		r.letGo(e)
		if reset {
			Refuse(e.fd)
		} else {
			unix.Close(e.fd)
		}
	}
	w := r.worker
	w.mu.Lock()
	w.unwatchLocked(r.ends[0].slot)
	w.unwatchLocked(r.ends[1].slot)
	w.mu.Unlock()
	if r.done != nil {
		r.done()
	}
	r.group.leave(r)
}

func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}
