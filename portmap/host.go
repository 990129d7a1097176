package portmap

import (
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

// Host is the Dialer for containers that this process's own network namespace has a route to. It uses ordinary
// sockets, so the container sees an address of the host, such as its bridge's, in place of the client's.
type Host struct{}

// StartTCP begins to connect a socket to target.
func (Host) StartTCP(_, target netip.AddrPort) (fd int, err error) {
	if fd, err = splice.Socket(target.Addr()); err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, splice.Sockaddr(target)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return -1, os.NewSyscallError("connect", err)
	}
	return fd, nil
}

// DialUDP connects a socket to target; no packet is sent.
func (Host) DialUDP(_, target netip.AddrPort) (fd int, err error) {
	if fd, err = socketUDP(target.Addr()); err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, splice.Sockaddr(target)); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("connect", err)
	}
	return fd, nil
}
