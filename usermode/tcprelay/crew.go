package tcprelay

import "sync"

// maxIdle is how many goroutines of a crew wait for work at most. With more, memory lies idle.
const maxIdle = 64

// crew runs functions in goroutines that stay for a while: what a connection calls goes deep into netstack, and to grow a new goroutine's
// stack to that, by copying it several times, was a twentieth of what a short connection cost.
type crew struct {
	work chan func()     // unbuffered: whoever receives is idle
	idle chan struct{}   // has an element for each that waits
	done <-chan struct{} // closed: goroutines end that have nothing to do
	wg   *sync.WaitGroup // has them
}

func newCrew(done <-chan struct{}, wg *sync.WaitGroup) crew {
	return crew{make(chan func()), make(chan struct{}, maxIdle), done, wg}
}

// do has f called in another goroutine.
func (c *crew) do(f func()) {
	select {
	case c.work <- f:
	default:
		c.wg.Go(func() { c.serve(f) })
	}
}

func (c *crew) serve(f func()) {
	for {
		f()
		select {
		case c.idle <- struct{}{}:
		default:
			return
		}
		select {
		case f = <-c.work:
			<-c.idle
		case <-c.done:
			return
		}
	}
}
