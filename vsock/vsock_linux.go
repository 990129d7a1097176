package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

func dialVsock(ctx context.Context, a Addr) (net.Conn, error) {
	if a.cid == cidAny || a.port == 0 {
		return nil, errors.New("to dial takes a CID and a port")
	}
	conn, err := vsock.DialContext(ctx, a.cid, a.port, nil)
	switch {
	case errors.Is(err, unix.ECONNRESET): // how virtio says no
		return nil, unix.ECONNREFUSED
	case errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("no transport of this kernel leads to the CID: %w", bare(err))
	case err != nil:
		return nil, err // not conn: a nil in it would not be nil
	}
	widen(conn)
	return conn, nil
}

// window is how many bytes the sender may have under way, four times as many as it is by itself: a few of the longest Ethernet frames
// of a virtual machine, so that neither end waits for the other one's turn.
const window = 1 << 20

// widen makes room for a window of bytes: the receiver's buffer is what it lets the sender have under way. See vsock(7).
func widen(conn *vsock.Conn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptUint64(int(fd), unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_MAX_SIZE, window)
		unix.SetsockoptUint64(int(fd), unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_SIZE, window)
	})
}

// listenVsock lets the kernel choose the port for 0.
func listenVsock(a Addr) (net.Listener, error) {
	l, err := vsock.ListenContextID(a.cid, a.port, nil)
	if err != nil {
		return nil, err
	}
	return listener{l}, nil
}

// listener has the error of package net for Accept after Close. The library's own is EBADF, unless Accept was waiting.
type listener struct{ *vsock.Listener }

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if errors.Is(err, unix.EBADF) {
		return nil, net.ErrClosed
	}
	if err != nil {
		return nil, err
	}
	widen(conn.(*vsock.Conn))
	return conn, nil
}
