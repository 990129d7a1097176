//go:build unix && !linux

package l2

import (
	"errors"

	"golang.org/x/sys/unix"
)

// writeNow writes as much of b as there is room for.
func writeNow(fd uintptr, b []byte) (int, error) {
	for {
		n, err := unix.Write(int(fd), b)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOBUFS):
			return 0, nil
		default:
			return 0, err
		}
	}
}
