package publish

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// spliceFrom is how many bytes are worth splicing. Fewer are copied, which takes two system calls in place of five.
	spliceFrom = 32 << 10
	// maxPipes is how many pipes there may be in use: each is two descriptors, and one whose stream is not read stays in use. Beyond,
	// data is copied.
	maxPipes = 256
	pipeSize = 1 << 20 // bytes, fs.pipe-max-size of an unprivileged process
)

// sendSpliced sends what waits in a TCP connection as one chunk, by reference: the chunk's length goes into a pipe, and behind it as many
// bytes of the connection's, which are there already. It reports false if that is not possible here, or not worth it.
//
// Of the streams that have chunks only unix sockets take references.
func sendSpliced(out sink, from source) (bool, error) {
	in, ok := from.(*inlet)
	if !ok || !out.chunks || in.queued < spliceFrom {
		return false, nil
	}
	if _, ok := out.outlet.to.(*net.UnixConn); !ok || out.outlet.raw == nil {
		return false, nil
	}
	p := takePipe()
	if p == nil {
		return false, nil
	}
	s := splicing{in: in, out: out.outlet, pipe: p, left: min(in.queued, maxChunk)}
	err := s.run()
	p.put(err == nil)
	return true, err
}

// splicing is one chunk on its way.
type splicing struct {
	in   *inlet
	out  *outlet
	pipe *pipe
	left int // bytes that in still has
	held int // bytes that the pipe has
	err  error
}

func (s *splicing) run() error {
	var head [chunkHead]byte
	binary.BigEndian.PutUint32(head[:], uint32(s.left))
	if _, err := unix.Write(s.pipe.w, head[:]); err != nil {
		return os.NewSyscallError("write", err)
	}
	for s.held = len(head); s.left > 0 || s.held > 0; {
		if s.left > 0 {
			if err := s.in.raw.Read(s.pull); err != nil {
				return err
			}
		}
		if s.err == nil {
			if err := s.out.raw.Write(s.push); err != nil {
				return err
			}
		}
		if s.err != nil {
			return s.err
		}
	}
	return nil
}

// pull fills the pipe.
func (s *splicing) pull(fd uintptr) bool {
	n, err := move(int(fd), s.pipe.w, s.left)
	switch {
	case err == unix.EAGAIN:
		return s.held > 0 // the pipe is full
	case err != nil:
		s.err = os.NewSyscallError("splice", err)
	case n == 0:
		s.err = io.ErrUnexpectedEOF
	}
	s.left, s.held = s.left-n, s.held+n
	return true
}

// push empties the pipe.
func (s *splicing) push(fd uintptr) bool {
	for s.held > 0 {
		n, err := move(s.pipe.r, int(fd), s.held)
		if err == unix.EAGAIN {
			return false
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			s.err = os.NewSyscallError("splice", err)
			break
		}
		s.held -= n
	}
	return true
}

// move is splice(2). It does not wait.
func move(from, to, n int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return max(int(n), 0), err
		}
	}
}

// pipe is what splice(2) moves data through.
type pipe struct {
	r, w    int
	cleanup runtime.Cleanup
}

// pipes are the empty ones. The garbage collector closes those that nobody has needed for a while.
var (
	pipes      sync.Pool
	pipesInUse atomic.Int32
)

// takePipe returns an empty pipe; nil: there is none to be had.
func takePipe() *pipe {
	if pipesInUse.Add(1) > maxPipes {
		pipesInUse.Add(-1)
		return nil
	}
	if p, ok := pipes.Get().(*pipe); ok {
		return p
	}
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		pipesInUse.Add(-1)
		return nil
	}
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // it may stay at 64 KiB
	p := &pipe{r: fds[0], w: fds[1]}
	p.cleanup = runtime.AddCleanup(p, closeBoth, fds)
	return p
}

// put takes a pipe back; it is of use only if it is empty.
func (p *pipe) put(empty bool) {
	pipesInUse.Add(-1)
	if empty {
		pipes.Put(p)
		return
	}
	p.cleanup.Stop()
	closeBoth([2]int{p.r, p.w})
}

func closeBoth(fds [2]int) {
	unix.Close(fds[0])
	unix.Close(fds[1])
}
