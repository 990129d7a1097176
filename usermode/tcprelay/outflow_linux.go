package tcprelay

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// vector is a batch as writev(2) takes it.
type vector struct {
	iovs []unix.Iovec
	left []unix.Iovec // of iovs, not yet written
	err  error
	some func(fd uintptr) bool // writeSome; made once
}

// writeTo writes the segments: to a socket as they are, to anything else in large pieces.
func (b *batch) writeTo(host io.Writer) error {
	var raw syscall.RawConn
	var err error
	switch c := host.(type) {
	case *net.TCPConn:
		raw, err = c.SyscallConn()
	case *net.UnixConn:
		raw, err = c.SyscallConn()
	case *socket:
		raw = c.raw
	default:
		return b.writeChunks(host)
	}
	if err != nil {
		return err
	}
	v := &b.vector
	for _, s := range b.segments {
		if len(s) > 0 {
			v.iovs = append(v.iovs, nonblock.Iovec(s))
		}
	}
	v.left = v.iovs
	if v.some == nil {
		v.some = v.writeSome
	}
	if err := raw.Write(v.some); err != nil {
		return err
	}
	return v.err
}

// writeSome writes what is left until nothing is, and tells whether it need not be called again.
func (v *vector) writeSome(fd uintptr) bool {
	for v.err = nil; len(v.left) > 0; {
		n, err := nonblock.Writev(int(fd), v.left)
		if err == unix.EAGAIN {
			return false
		}
		if v.err = err; err != nil {
			return true
		}
		v.left = nonblock.Skip(v.left, n)
	}
	return true
}

// reset makes v ready for another batch, and lets go of this one's memory.
func (v *vector) reset() {
	clear(v.iovs)
	v.iovs, v.left, v.err = v.iovs[:0], nil, nil
}
