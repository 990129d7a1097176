package vsock

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// firstFD is the first descriptor that systemd passes, SD_LISTEN_FDS_START.
const firstFD = 3

// listenFD listens on a socket that systemd passed. The descriptor stays open when the listener is closed, as it does in
// systemd: clients wait for the next listener instead of being refused.
func listenFD(a Addr) (net.Listener, error) {
	fd, err := passed(os.Getenv, os.Getpid(), a.host)
	if err != nil {
		return nil, err
	}
	if err := listening(fd); err != nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, err)
	}
	unix.CloseOnExec(fd)
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(own), a.String())
	defer f.Close()
	// Package net does not know the family, and takes the descriptor for nothing of its.
	if family, err := unix.GetsockoptInt(own, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && family == unix.AF_VSOCK {
		l, err := vsock.FileListener(f)
		if err != nil {
			return nil, err
		}
		return listener{l}, nil
	}
	return net.FileListener(f)
}

// passed finds the descriptor by sd_listen_fds(3)'s environment. The name may be a number, or empty if there is just one.
func passed(env func(string) string, pid int, name string) (fd int, err error) {
	if env("LISTEN_PID") != strconv.Itoa(pid) {
		return 0, errors.New("systemd has passed nothing to this process")
	}
	n, err := strconv.Atoi(env("LISTEN_FDS"))
	if err != nil || n < 1 || n > 1<<16 {
		return 0, fmt.Errorf("systemd has passed LISTEN_FDS=%q", env("LISTEN_FDS"))
	}
	if name == "" {
		if n > 1 {
			return 0, fmt.Errorf("systemd has passed %d sockets: say which", n)
		}
		return firstFD, nil
	}
	names := strings.Split(env("LISTEN_FDNAMES"), ":")
	names = names[:min(n, len(names))]
	for i, s := range names {
		if s != name {
			continue
		}
		if fd != 0 {
			return 0, fmt.Errorf("systemd has passed more than one socket of that name: say fd:%d or fd:%d", fd, firstFD+i)
		}
		fd = firstFD + i
	}
	if fd != 0 {
		return fd, nil
	}
	if number, err := strconv.Atoi(name); err == nil && number >= firstFD && number < firstFD+n {
		return number, nil
	}
	return 0, fmt.Errorf("systemd has passed %d sockets with the names %q", n, names)
}

// listening refuses what Accept would not work on.
func listening(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	accepts, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if kind != unix.SOCK_STREAM || accepts == 0 {
		return errors.New("it is no stream socket that listens (Accept=no, ListenStream=)")
	}
	return nil
}
