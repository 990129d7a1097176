package l2

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// widen makes room for a window of bytes in a unix socket: beyond net.core.wmem_max for who may, CAP_NET_ADMIN; see socket(7).
// AF_VSOCK is package vsock's.
func widen(c net.Conn) {
	u, ok := c.(syscall.Conn)
	if !ok || c.LocalAddr().Network() != "unix" {
		return
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF); err == nil && n >= 2*window {
			return // the kernel counts its own part as well, and doubles what it is asked for
		}
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, window) != nil {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, window)
		}
	})
}

// directly returns what reads r's descriptor, if r is no more than that and does not block, and else r.
func directly(r io.Reader) io.Reader {
	switch c := r.(type) {
	case *net.TCPConn, *net.UnixConn, *os.File:
	case net.Conn:
		if a := c.LocalAddr(); a == nil || a.Network() != "vsock" {
			return r
		}
	default:
		return r
	}
	raw := nonblocking(r)
	if raw == nil {
		return r
	}
	d := &directReader{raw: raw}
	d.once = func(fd uintptr) bool {
		d.n, d.err = nonblock.Read(int(fd), d.b)
		return d.err != unix.EAGAIN
	}
	return d
}

// directReader reads from a descriptor.
type directReader struct {
	raw syscall.RawConn

	// The arguments and results of once, which raw calls.
	b    []byte
	n    int
	err  error
	once func(fd uintptr) bool
}

func (d *directReader) Read(b []byte) (int, error) {
	d.b = b
	err := d.raw.Read(d.once)
	d.b = nil
	switch {
	case err != nil:
		return 0, err
	case d.err != nil:
		return 0, os.NewSyscallError("read", d.err)
	case d.n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	return d.n, nil
}

// writeNow writes as much of b as there is room for.
func writeNow(fd uintptr, b []byte) (int, error) {
	n, err := nonblock.Write(int(fd), b)
	if err == unix.EAGAIN {
		return 0, nil
	}
	return n, os.NewSyscallError("write", err)
}

// writeAll waits until all of b is written.
func (s *streamWriter) writeAll(b []byte) error {
	if s.raw == nil {
		_, err := s.w.Write(b)
		return err
	}
	s.b = b
	err := s.raw.Write(s.toEnd)
	s.b = nil
	if err != nil {
		return err
	}
	return s.err
}

// writeOn writes of s.b until nothing is left, and tells whether it need not be called again.
func (s *streamWriter) writeOn(fd uintptr) bool {
	for {
		s.n, s.err = writeNow(fd, s.b)
		s.b = s.b[s.n:]
		if len(s.b) == 0 || s.err != nil {
			return true
		}
		if s.n == 0 {
			return false
		}
	}
}

// vector is pieces that are written one behind the other by one call.
type vector []unix.Iovec

func (v vector) with(b []byte) vector {
	if len(b) == 0 {
		return v
	}
	return append(v, nonblock.Iovec(b))
}

// writeVectorNow writes as much of v as there is room for.
func writeVectorNow(fd uintptr, v vector) (int, error) {
	n, err := nonblock.Writev(int(fd), v)
	if err == unix.EAGAIN {
		return 0, nil
	}
	return n, os.NewSyscallError("writev", err)
}
