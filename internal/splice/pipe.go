package splice

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	pipeSize = 1 << 20 // bytes, fs.pipe-max-size of an unprivileged process; less where it is not granted
	// Pipes of one worker that may be full of data that nobody takes. Beyond, data is copied.
	maxPipes = 512
	// Empty pipes are kept for a moment: transfers need them again and again.
	keptPipes = 8
	keepPipes = time.Second
)

// pipe is what splice(2) moves data through.
type pipe struct {
	r, w int
	n    int // bytes in it
}

// pipes are the pipes of one worker.
type pipes struct {
	idle  []*pipe
	open  int
	since time.Time // when idle was used last
}

// get returns an empty pipe; nil: there is none to be had.
func (ps *pipes) get() *pipe {
	if last := len(ps.idle) - 1; last >= 0 {
		p := ps.idle[last]
		ps.idle = ps.idle[:last]
		return p
	}
	if ps.open >= maxPipes {
		return nil
	}
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // it may stay at 64 KiB
	ps.open++
	return &pipe{r: fds[0], w: fds[1]}
}

// put takes a pipe back. One that is not empty is closed.
func (ps *pipes) put(p *pipe) {
	if p.n == 0 && len(ps.idle) < keptPipes {
		if len(ps.idle) == 0 {
			ps.since = time.Now()
		}
		ps.idle = append(ps.idle, p)
		return
	}
	ps.destroy(p)
}

func (ps *pipes) destroy(p *pipe) {
	unix.Close(p.r)
	unix.Close(p.w)
	ps.open--
}

// trim closes pipes that nobody has needed for a while, and says when to look again; zero: there are none.
func (ps *pipes) trim() time.Time {
	if len(ps.idle) == 0 {
		return time.Time{}
	}
	if time.Since(ps.since) >= keepPipes {
		ps.close()
		return time.Time{}
	}
	return ps.since.Add(keepPipes)
}

// close closes the idle pipes.
func (ps *pipes) close() {
	for _, p := range ps.idle {
		ps.destroy(p)
	}
	ps.idle = nil
}
