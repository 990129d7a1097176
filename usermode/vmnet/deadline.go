package vmnet

import (
	"sync"
	"time"
)

// deadline is when an operation ends that waits. The zero value is never.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	past  chan struct{} // closed when it has passed; nil: not made yet
}

// passed is closed when the deadline has passed. A later deadline makes another channel.
func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.channelLocked()
}

func (d *deadline) channelLocked() chan struct{} {
	if d.past == nil {
		d.past = make(chan struct{})
	}
	return d.past
}

// set makes it t; the zero time: never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		d.past = nil // it has passed, or is about to; its function closes what it knows
	}
	d.timer = nil
	past := d.channelLocked()
	select {
	case <-past:
		d.past = nil
		past = d.channelLocked()
	default:
	}
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		close(past)
		return
	}
	d.timer = time.AfterFunc(wait, func() { close(past) })
}
