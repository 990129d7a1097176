package tcprelay

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// dial connects to dst. Where that is this machine, the connection stands when connect(2) returns, and nothing has to be waited for:
// package net's dialer has a timer, another goroutine and a trip through the poller for every attempt.
func (t *Relays) dial(dst netip.AddrPort) (conn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if dst.Addr().Zone() != "" {
		return t.dialer.DialContext(t.ctx, "tcp", dst.String()) // which knows the numbers of interfaces
	}
	c, err := t.connectSocket(dst)
	if err != nil {
		return nil, fmt.Errorf("dial tcp %s: %w", dst, err)
	}
	return c, nil
}

func (t *Relays) connectSocket(dst netip.AddrPort) (_ *socket, err error) {
	fd, err := nonblock.Socket(dst.Addr())
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := setKeepAlive(fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	switch err := nonblock.Connect(fd, dst); err {
	case nil, unix.EINPROGRESS, unix.EINTR: // after EINTR it goes on by itself
	default:
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	c, err := newSocket(fd)
	if err != nil {
		return nil, err
	}
	if err := c.await(t.ctx, t.cfg.Limits.Dial); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// setKeepAlive sets a connection's options: as package net would.
func setKeepAlive(fd int) error {
	for _, o := range []struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count},
	} {
		if err := nonblock.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

// socket is a TCP connection of the host's. A *net.TCPConn cannot be made of a descriptor without duplicating that.
type socket struct {
	*os.File
	raw syscall.RawConn
}

// newSocket takes fd, which must not block.
func newSocket(fd int) (*socket, error) {
	f := os.NewFile(uintptr(fd), "tcp")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &socket{f, raw}, nil
}

// await waits until the connection stands.
func (c *socket) await(ctx context.Context, timeout time.Duration) error {
	var outcome error
	look := func(fd uintptr) (decided bool) {
		decided, outcome = nonblock.Connected(int(fd))
		return decided
	}
	var now bool
	if err := c.raw.Control(func(fd uintptr) { now = look(fd) }); err != nil {
		return err
	}
	if now {
		return os.NewSyscallError("connect", outcome)
	}
	if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.SetWriteDeadline(time.Unix(1, 0)) })
	err := c.raw.Write(look)
	if !stop() {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	if outcome != nil {
		return os.NewSyscallError("connect", outcome)
	}
	return c.SetWriteDeadline(time.Time{})
}

// CloseWrite ends what is sent.
func (c *socket) CloseWrite() error {
	var failed error
	if err := c.raw.Control(func(fd uintptr) { failed = nonblock.Shutdown(int(fd), unix.SHUT_WR) }); err != nil {
		return err
	}
	return os.NewSyscallError("shutdown", failed)
}

// SetLinger says what Close does: with 0, a reset.
func (c *socket) SetLinger(sec int) error {
	l := unix.Linger{Onoff: 1, Linger: int32(sec)}
	if sec < 0 {
		l = unix.Linger{}
	}
	var failed error
	if err := c.raw.Control(func(fd uintptr) { failed = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &l) }); err != nil {
		return err
	}
	return os.NewSyscallError("set SO_LINGER", failed)
}
