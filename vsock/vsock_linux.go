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
	return conn, nil
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
	return conn, nil
}
