//go:build !windows

package forward

import (
	"errors"
	"fmt"
	"net"
)

// listenPipe has no named pipes to make.
func listenPipe(path string) (net.Listener, error) {
	return nil, fmt.Errorf("listen npipe %s: named pipes are there on windows only: %w", path, errors.ErrUnsupported)
}
