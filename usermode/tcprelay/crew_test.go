package tcprelay

import (
	"sync"
	"testing"
)

func TestCrew(t *testing.T) {
	var joined sync.WaitGroup
	done := make(chan struct{})
	c := newCrew(done, &joined)
	const n = 3 * maxIdle
	// None may wait for another: all have to be running for any to go on.
	var running, ended sync.WaitGroup
	running.Add(n)
	ended.Add(n)
	for range n {
		c.do(func() {
			defer ended.Done()
			running.Done()
			running.Wait()
		})
	}
	ended.Wait()
	for len(c.idle) < maxIdle { // those that do not fit have ended, or are about to
		ended.Add(1)
		c.do(ended.Done)
		ended.Wait()
	}
	close(done)
	joined.Wait()
	ended.Add(1)
	c.do(ended.Done) // late, and done all the same
	ended.Wait()
	joined.Wait()
}
