package portmap

import (
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

// Bytes that may wait in a socket's buffers, where the kernel allows as many: all clients share one listener.
const (
	listenerBuffer = 4 << 20
	flowBuffer     = 1 << 20
)

// socketUDP makes a non-blocking UDP socket for addresses of a's family.
func socketUDP(a netip.Addr) (fd int, err error) {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_UDP)
	return fd, os.NewSyscallError("socket", err)
}

// listenUDP opens a socket that is bound to the address, port 0 meaning one of the kernel's choice, and returns the port.
func listenUDP(at netip.AddrPort) (fd int, port uint16, err error) {
	if fd, err = socketUDP(at.Addr()); err != nil {
		return -1, 0, err
	}
	if port, err = bindUDP(fd, at); err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, port, nil
}

func bindUDP(fd int, at netip.AddrPort) (port uint16, err error) {
	if at.Addr().Is6() {
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return 0, os.NewSyscallError("set IPV6_V6ONLY", err)
		}
	}
	if at.Addr().IsUnspecified() {
		if err := askDestination(fd, at.Addr()); err != nil {
			return 0, err
		}
	}
	roomy(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, listenerBuffer)
	roomy(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, listenerBuffer)
	takeWhole(fd)
	if err := unix.Bind(fd, splice.Sockaddr(at)); err != nil {
		return 0, os.NewSyscallError("bind", err)
	}
	sa, err := unix.Getsockname(fd)
	return splice.AddrPort(sa).Port(), os.NewSyscallError("getsockname", err)
}

// roomy gives a socket a receive or send buffer, as long as the kernel allows.
func roomy(fd, force, option, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size)
	}
}

// takeWhole has the kernel hand over bursts as they came, where it can (Linux 5.0).
func takeWhole(fd int) { unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) }
