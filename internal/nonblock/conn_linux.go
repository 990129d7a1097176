package nonblock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a stream socket that the runtime's poller does not have.
//
// The runtime asks the kernel for all events of a descriptor, also for room to write, as long as it is open. A unix socket tells its
// sender of room whenever the other end has read (unix_write_space), AF_VSOCK with every credit: so each message that is read
// wakes the process that has written it, for nothing. Of two processes that exchange small messages that is every other wake-up.
//
// A Conn is in two epolls of its own, which the runtime polls in its place (epoll(7): an epoll's descriptor can be read when there are
// events). One asks for what can be read, the other for room, while somebody waits for it.
//
// SyscallConn allocates nothing when it is used.
type Conn struct {
	raw           rawConn
	local, remote net.Addr
}

var (
	_ net.Conn     = (*Conn)(nil)
	_ syscall.Conn = (*Conn)(nil)
)

// Take makes a Conn of c's socket, which must not block. c is closed, its socket lives on. After an error c is as it was.
func Take(c net.Conn) (_ *Conn, err error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	if cerr := raw.Control(func(theirs uintptr) { fd, err = unix.FcntlInt(theirs, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, fmt.Errorf("duplicate socket: %w", err)
	}
	q := &Conn{raw: rawConn{fd: fd}, local: c.LocalAddr(), remote: c.RemoteAddr()}
	if err := q.raw.open(); err != nil {
		q.Close()
		return nil, err
	}
	c.Close() // one of the socket's two descriptors
	return q, nil
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (n int, err error) {
	werr := c.raw.Read(func(fd uintptr) bool {
		n, err = Read(int(fd), b)
		return err != unix.EAGAIN
	})
	switch {
	case werr != nil:
		return 0, werr
	case err != nil:
		return 0, os.NewSyscallError("read", err)
	case n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (n int, err error) {
	werr := c.raw.Write(func(fd uintptr) bool {
		for err = nil; n < len(b) && err == nil; {
			var k int
			k, err = Write(int(fd), b[n:])
			n += k
		}
		return err != unix.EAGAIN
	})
	if werr != nil {
		return n, werr
	}
	return n, os.NewSyscallError("write", err)
}

// SyscallConn implements syscall.Conn.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return &c.raw, nil }

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.raw.in.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn. (Whoever writes waits until he can read an epoll.)
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.raw.out.SetReadDeadline(t) }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// Close implements net.Conn. The socket is closed when nobody reads or writes any more, which he is told to.
func (c *Conn) Close() error { return c.raw.close() }

// rawConn is a Conn's socket.
type rawConn struct {
	fd      int
	in, out *os.File // epolls
	rin     syscall.RawConn
	rout    syscall.RawConn
	room    int // out's descriptor

	using  sync.RWMutex // by who uses fd
	closed bool

	// Each is for one goroutine at a time, with the arguments of once and whole, which rin and rout call: closures would be an
	// allocation for each call.
	rmu, wmu    sync.Mutex
	read, write func(fd uintptr) bool
	asks        bool  // out does, for room
	failed      error // to ask
	once, whole func(uintptr) bool
}

func (c *rawConn) open() (err error) {
	if c.in, c.rin, _, err = epoll(c.fd, unix.EPOLLIN|unix.EPOLLRDHUP); err != nil {
		return err
	}
	if c.out, c.rout, c.room, err = epoll(c.fd, 0); err != nil {
		return err
	}
	c.once = func(uintptr) bool { return c.read(uintptr(c.fd)) }
	c.whole = c.writeOrAsk
	return nil
}

// epoll makes an epoll for events of a socket.
func epoll(socket int, events uint32) (*os.File, syscall.RawConn, int, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, nil, -1, os.NewSyscallError("epoll_create1", err)
	}
	if err = unix.SetNonblock(fd, true); err == nil { // or the runtime would not poll it
		err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, socket, &unix.EpollEvent{Events: events})
	}
	if err != nil {
		unix.Close(fd)
		return nil, nil, -1, fmt.Errorf("poll socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "epoll")
	raw, err := f.SyscallConn()
	return f, raw, fd, err
}

// Control implements syscall.RawConn.
func (c *rawConn) Control(f func(fd uintptr)) error {
	c.using.RLock()
	defer c.using.RUnlock()
	if c.closed {
		return net.ErrClosed
	}
	f(uintptr(c.fd))
	return nil
}

// Read implements syscall.RawConn.
func (c *rawConn) Read(f func(fd uintptr) bool) error {
	c.using.RLock()
	defer c.using.RUnlock()
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.read = f
	err := c.rin.Read(c.once)
	c.read = nil
	return ended(err)
}

// Write implements syscall.RawConn.
func (c *rawConn) Write(f func(fd uintptr) bool) error {
	c.using.RLock()
	defer c.using.RUnlock()
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.write, c.failed = f, nil
	err := c.rout.Read(c.whole)
	c.write = nil
	return errors.Join(ended(err), c.failed)
}

func (c *rawConn) writeOrAsk(uintptr) bool {
	for !c.write(uintptr(c.fd)) {
		if c.asks {
			return false
		}
		if c.failed = c.ask(unix.EPOLLOUT); c.failed != nil {
			return true
		}
		c.asks = true
		// Room that came before that is no event where an earlier event has not been fetched: so it is tried once more.
	}
	if c.asks {
		c.asks = false
		c.failed = c.ask(0)
	}
	return true
}

// ask sets what out has an event for.
func (c *rawConn) ask(events uint32) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(c.room, unix.EPOLL_CTL_MOD, c.fd, &unix.EpollEvent{Events: events}))
}

// ended is err, with the error of package net where close has ended the wait.
func ended(err error) error {
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%w (%w)", net.ErrClosed, err)
	}
	return err
}

func (c *rawConn) close() (err error) {
	for _, f := range []*os.File{c.in, c.out} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	c.using.Lock()
	defer c.using.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed = true
	return errors.Join(err, os.NewSyscallError("close", unix.Close(c.fd)))
}
