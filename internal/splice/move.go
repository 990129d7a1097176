package splice

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// block is how many bytes are worth a pipe: less is read and written, which takes as many system calls and nothing of
// the kernel's memory while nobody sends.
const block = 16 << 10

var blocks = sync.Pool{New: func() any { return new([block]byte) }}

// move copies src to dst until src ends. What comes in small pieces goes through a buffer that is held only while it is
// full, what comes in large ones through splice(2): an idle connection costs two goroutines and nothing else.
func move(dst, src *net.TCPConn) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	p := piece{}
	p.readFn = p.read
	for {
		if err := p.next(raw); err != nil {
			return ended(err)
		}
		full := len(p.data) == block
		_, err := dst.Write(p.data)
		p.release()
		if err != nil {
			return err
		}
		for full {
			var n int64
			if n, err = queued(raw); err != nil {
				return err
			}
			if full = n >= block; !full {
				break
			}
			// Both are bare TCP connections: package net splices, and any wrapper would stop that.
			if _, err := io.CopyN(dst, src, n); err != nil {
				return ended(err)
			}
		}
	}
}

// ended is nil for the end of a stream.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// piece is what was read at once.
type piece struct {
	block  *[block]byte
	data   []byte // in block
	err    error
	readFn func(fd uintptr) bool // read; made once, since a method value is an allocation
}

// next waits for the next piece. Its end is io.EOF.
func (p *piece) next(raw syscall.RawConn) error {
	if err := raw.Read(p.readFn); err != nil {
		return err
	}
	return p.err
}

// read is a syscall.RawConn's callback: false asks to be called again when there is something.
func (p *piece) read(fd uintptr) bool {
	p.block = blocks.Get().(*[block]byte)
	n, err := unix.Read(int(fd), p.block[:])
	for err == unix.EINTR {
		n, err = unix.Read(int(fd), p.block[:])
	}
	if n <= 0 {
		p.release()
	}
	switch {
	case err == unix.EAGAIN:
		return false
	case err == nil && n == 0:
		err = io.EOF
	case err == nil:
		p.data = p.block[:n]
	}
	p.err = err
	return true
}

func (p *piece) release() {
	blocks.Put(p.block)
	p.block, p.data = nil, nil
}

// queued is how many bytes can be read without waiting.
func queued(raw syscall.RawConn) (n int64, err error) {
	cerr := raw.Control(func(fd uintptr) {
		var m int
		m, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		n = int64(m)
	})
	return n, errors.Join(cerr, err)
}
