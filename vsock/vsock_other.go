//go:build !linux

package vsock

import (
	"context"
	"errors"
	"net"
)

func dialVsock(context.Context, Addr) (net.Conn, error) { return nil, errors.ErrUnsupported }
func listenVsock(Addr) (net.Listener, error)            { return nil, errors.ErrUnsupported }
func listenFD(Addr) (net.Listener, error)               { return nil, errors.ErrUnsupported }
