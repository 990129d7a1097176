package publish

import (
	"errors"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	maxStanding = 64               // streams of a session that wait for connections
	maxWaiting  = 1024             // connections of a session that wait for streams
	maxWait     = 10 * time.Second // for how long
)

var (
	errNoStream = errors.New("the guest has no stream for it")
	errBusy     = errors.New("too many connections wait for the guest")
)

// stream is a stream of the guest's, and what the guest said on it too early.
type stream struct {
	conn   net.Conn
	early  []byte
	chunks bool // its bytes travel in chunks
}

// pool is a session's standing streams, or those who wait for one.
type pool struct {
	mu       sync.Mutex
	closed   bool
	standing []stream      // the oldest first
	waiting  []chan stream // likewise; each has room for one, and is closed when there will be none
}

// put adds a stream, which is the pool's from now on. Where there are too many, the oldest goes: the guest has most likely let go of
// it.
func (p *pool) put(s stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		s.conn.Close()
		return
	case len(p.waiting) > 0:
		p.waiting[0] <- s
		p.waiting = p.waiting[1:]
		return
	case len(p.standing) == maxStanding:
		p.standing[0].conn.Close()
		p.standing = p.standing[1:]
	}
	p.standing = append(p.standing, s)
}

// take returns a stream, for which it may wait until done is closed or until the deadline.
func (p *pool) take(done <-chan struct{}, deadline time.Time) (stream, error) {
	p.mu.Lock()
	if len(p.standing) > 0 {
		s := p.standing[0]
		p.standing = p.standing[1:]
		p.mu.Unlock()
		return s, nil
	}
	if p.closed || len(p.waiting) == maxWaiting {
		defer p.mu.Unlock()
		if p.closed {
			return stream{}, ErrClosed
		}
		return stream{}, errBusy
	}
	w := make(chan stream, 1)
	p.waiting = append(p.waiting, w)
	p.mu.Unlock()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case s, ok := <-w:
		if !ok {
			return stream{}, ErrClosed
		}
		return s, nil
	case <-timer.C:
	case <-done:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.waiting, w); i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
		return stream{}, errNoStream
	}
	if s, ok := <-w; ok { // it came just now
		return s, nil
	}
	return stream{}, ErrClosed
}

// clear ends what stands.
func (p *pool) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clearLocked()
}

func (p *pool) clearLocked() {
	for _, s := range p.standing {
		s.conn.Close()
	}
	p.standing = nil
}

// close ends what stands and who waits.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.clearLocked()
	for _, w := range p.waiting {
		close(w)
	}
	p.waiting = nil
}
