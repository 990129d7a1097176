package vsock

import (
	"context"
	"net"

	"golang.org/x/sys/windows"
)

const (
	errRefused = windows.WSAECONNREFUSED
	errBusy    = windows.WSAEWOULDBLOCK
	maxPath    = 107
)

// lockDir has nothing to lock: two processes that start at the same moment on one stale socket are not kept apart here.
func lockDir(string) (unlock func() error, err error) { return func() error { return nil }, nil }

// bindUnix leaves the socket's access list to its directory, as Windows has it: there is no mode.
func bindUnix(path string) (net.Listener, error) {
	var lc net.ListenConfig
	return lc.Listen(context.Background(), "unix", path)
}
