//go:build unix

package l2

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// nonblocking returns the descriptor of a connection or file, if to read or write it never blocks the thread, and else nil.
func nonblocking(f any) syscall.RawConn {
	c, ok := f.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	var flags int
	if ctl := raw.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) }); ctl != nil || err != nil {
		return nil
	}
	if flags&unix.O_NONBLOCK == 0 {
		return nil
	}
	return raw
}

// Stdio makes a link of standard input and output, or of the descriptors given in their place. It takes copies of them, makes
// the open files behind them non-blocking, for whoever shares them too, and leaves the originals to the caller.
func Stdio(in, out *os.File, opts Options) (*Link, error) {
	r, err := pollable(in)
	if err != nil {
		return nil, err
	}
	w, err := pollable(out)
	if err != nil {
		r.Close()
		return nil, err
	}
	return Files(r, w, opts), nil
}

func pollable(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make %s non-blocking: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
