package load

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// tally is what arrives of one job in a window that begins with the first of it.
type tally struct {
	end    time.Time
	length time.Duration
	bytes  atomic.Int64
	done   atomic.Int64
}

// add counts n bytes that have just arrived and tells whether the window is still open.
func (t *tally) add(n int) bool {
	if time.Now().After(t.end) {
		return false
	}
	t.bytes.Add(int64(n))
	t.done.Add(1)
	return true
}

// tallies are those of the jobs that have come in, by their ID.
type tallies struct {
	mu sync.Mutex
	m  map[uint64]*tally
}

// of returns the job's tally; at the first call its window begins.
func (ts *tallies) of(id uint64, length time.Duration) *tally {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	t := ts.m[id]
	if t == nil {
		if ts.m == nil {
			ts.m = map[uint64]*tally{}
		}
		t = &tally{end: time.Now().Add(length), length: length}
		ts.m[id] = t
	}
	return t
}

func (ts *tallies) get(id uint64) *tally {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return ts.m[id]
}

// wait returns what the window of a job has, once it is over. A job of which nothing came within timeout is an error.
func (ts *tallies) wait(id uint64, timeout time.Duration) (Result, error) {
	deadline := time.Now().Add(timeout)
	t := ts.get(id)
	for t == nil {
		if time.Now().After(deadline) {
			return Result{}, fmt.Errorf("nothing arrived within %v", timeout)
		}
		time.Sleep(time.Millisecond)
		t = ts.get(id)
	}
	time.Sleep(time.Until(t.end))
	return Result{Bytes: t.bytes.Load(), Done: int(t.done.Load()), Elapsed: t.length}, nil
}
