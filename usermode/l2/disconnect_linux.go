package l2

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// disconnect makes a datagram socket take packets from everybody again, see connect(2). One that is not connected it leaves alone: a
// UDP socket could lose its port.
func disconnect(fd int) error {
	if _, err := unix.Getpeername(fd); err != nil {
		return nil
	}
	to := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&to)), unsafe.Sizeof(to))
	if errno != 0 {
		return errno
	}
	return nil
}
