//go:build !windows

package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"
)

func dialHV(context.Context, Addr) (net.Conn, error) { return nil, errors.ErrUnsupported }
func listenHV(Addr) (net.Listener, error)            { return nil, errors.ErrUnsupported }

// Install writes the entry into this machine's registry, and may be repeated.
func (r Registration) Install() error {
	return fmt.Errorf("register %s: there is a registry on windows only: %w", r.Service, errors.ErrUnsupported)
}

// Remove takes the entry out of this machine's registry; one that is not there is success.
func (r Registration) Remove() error {
	return fmt.Errorf("unregister %s: there is a registry on windows only: %w", r.Service, errors.ErrUnsupported)
}
