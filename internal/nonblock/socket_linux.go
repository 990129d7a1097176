package nonblock

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Socket is socket(2): TCP of dst's family, which does not block.
func Socket(dst netip.Addr) (int, error) {
	family := unix.AF_INET6
	if dst.Is4() {
		family = unix.AF_INET
	}
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// Connect is connect(2). It returns unix.EINPROGRESS as a rule, though to an address of this machine both ends' handshake is done by then:
// Connected tells. A zone of dst is ignored.
func Connect(fd int, dst netip.AddrPort) error {
	var to unix.RawSockaddrInet6 // which is the longer one, and begins as the other does
	size := unsafe.Sizeof(to)
	if dst.Addr().Is4() {
		size = unsafe.Sizeof(unix.RawSockaddrInet4{})
		(*unix.RawSockaddrInet4)(unsafe.Pointer(&to)).Addr = dst.Addr().As4()
		to.Family = unix.AF_INET
	} else {
		to.Addr = dst.Addr().As16()
		to.Family = unix.AF_INET6
	}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&to.Port))[:], dst.Port())
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&to)), size)
	return failure(errno)
}

// Connected tells whether the outcome of a connect(2) is known, and what it is.
func Connected(fd int) (decided bool, _ error) {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
	var now unix.Timespec
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	switch {
	case errno == unix.EINTR || errno == 0 && n == 0:
		return false, nil
	case errno != 0:
		return true, errno
	case p.Revents&(unix.POLLERR|unix.POLLHUP|unix.POLLNVAL) == 0:
		return true, nil
	}
	outcome, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || outcome == 0 { // it stood, and has ended already: whoever reads will see
		return true, err
	}
	return true, unix.Errno(outcome)
}

// SetsockoptInt is setsockopt(2).
func SetsockoptInt(fd, level, name, value int) error {
	v := int32(value)
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0)
	return failure(errno)
}

// Shutdown is shutdown(2).
func Shutdown(fd, how int) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), uintptr(how), 0)
	return failure(errno)
}

func failure(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
