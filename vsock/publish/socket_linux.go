package publish

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// rawConn is a connection's own socket. There is none of what is more than a socket of the kernel's.
func rawConn(conn any) syscall.RawConn {
	var sc syscall.Conn
	switch c := conn.(type) {
	case *net.TCPConn:
		sc = c
	case *net.UnixConn:
		sc = c
	case interface {
		net.Conn
		syscall.Conn
	}:
		if c.LocalAddr().Network() != "vsock" {
			return nil
		}
		sc = c
	default:
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// inlet is the reading side of a connection. One goroutine uses it.
type inlet struct {
	from io.Reader
	raw  syscall.RawConn // nil: from is no socket
	tcp  bool

	queued int                   // how many bytes await has seen, of TCP
	look   func(fd uintptr) bool // lookAt; made once

	iovs [2]unix.Iovec
	vec  []unix.Iovec // of iovs
	wait bool
	n    int
	err  error
	some func(fd uintptr) bool // readSome; made once
}

func newInlet(from io.Reader) *inlet {
	in := &inlet{from: from, raw: rawConn(from)}
	_, in.tcp = from.(*net.TCPConn)
	in.some, in.look = in.readSome, in.lookAt
	return in
}

func (in *inlet) Read(b []byte) (int, error) { return in.read(b, nil, true) }

// read reads into b and, behind that, into room: either may be empty. It returns how many bytes that were. Without wait it may
// be none, and no error.
func (in *inlet) read(b, room []byte, wait bool) (int, error) {
	if in.raw == nil {
		if !wait {
			return 0, nil
		}
		if len(b) == 0 {
			b = room
		}
		return in.from.Read(b)
	}
	in.wait, in.vec = wait, in.iovs[:0]
	for _, b := range [...][]byte{b, room} {
		if len(b) > 0 {
			in.vec = append(in.vec, nonblock.Iovec(b))
		}
	}
	err := in.raw.Read(in.some)
	clear(in.iovs[:])
	switch {
	case err != nil:
		return 0, err
	case in.err == unix.EAGAIN:
		return 0, nil
	case in.err != nil:
		return 0, os.NewSyscallError("readv", in.err)
	case in.n == 0 && len(in.vec) > 0:
		return 0, io.EOF
	}
	return in.n, nil
}

func (in *inlet) readSome(fd uintptr) bool {
	if in.n, in.err = 0, nil; len(in.vec) > 0 {
		in.n, in.err = nonblock.Readv(int(fd), in.vec)
	}
	return in.err != unix.EAGAIN || !in.wait
}

// await waits until there is something to read, or nothing more will come.
func (in *inlet) await() error {
	if in.raw == nil {
		return nil
	}
	return in.raw.Read(in.look)
}

func (in *inlet) lookAt(fd uintptr) bool {
	in.queued = 0
	if in.tcp {
		if n, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ); err == nil && n > 0 {
			in.queued = n
			return true
		}
	}
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n != 0 || err != nil && err != unix.EINTR
}

// outlet is the writing side of a connection. One goroutine uses it.
type outlet struct {
	to  io.Writer
	raw syscall.RawConn // nil: to is no socket

	rest []byte
	err  error
	some func(fd uintptr) bool // writeSome; made once
}

func newOutlet(to io.Writer) *outlet {
	out := &outlet{to: to, raw: rawConn(to)}
	out.some = out.writeSome
	return out
}

// write writes all of b.
func (out *outlet) write(b []byte) error {
	if out.raw == nil {
		_, err := out.to.Write(b)
		return err
	}
	out.rest = b
	err := out.raw.Write(out.some)
	out.rest = nil
	if err == nil && out.err != nil {
		err = os.NewSyscallError("write", out.err)
	}
	return err
}

func (out *outlet) writeSome(fd uintptr) bool {
	for out.err = nil; len(out.rest) > 0; {
		n, err := nonblock.Write(int(fd), out.rest)
		if err == unix.EAGAIN {
			return false
		}
		if out.err = err; err != nil {
			break
		}
		out.rest = out.rest[n:]
	}
	return true
}
