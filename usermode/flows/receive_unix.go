//go:build unix && !linux

package flows

import (
	"errors"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// anyPort is for the system to choose.
var anyPort netip.AddrPort

// receiveSome receives until there is an error of the socket's, and returns that. The descriptor is read as soon as it
// can be, with memory that is taken only then.
func (f *udpFlow) receiveSome() error {
	raw, err := f.conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		b := buffers.Get().(*[maxDatagram]byte)
		defer buffers.Put(b)
		for {
			n, err := unix.Read(int(fd), b[:])
			switch err {
			case nil:
				f.received(b[:n])
			case unix.EINTR:
			case unix.EAGAIN:
				return false
			default:
				failed = os.NewSyscallError("read", err)
				return true
			}
		}
	})
	return errors.Join(err, failed)
}

// noBroadcast takes back what package net sets.
func noBroadcast(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = os.NewSyscallError("clear SO_BROADCAST", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0))
	})
	return errors.Join(err, failed)
}

// isRefused tells whether err is that nobody listens where an earlier datagram went.
func isRefused(err error) bool { return errors.Is(err, unix.ECONNREFUSED) }

// isExhausted tells whether err is that the process or the host has no more sockets.
func isExhausted(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// isUnreachable tells whether err is that no way leads to a destination.
func isUnreachable(err error) bool {
	return errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EHOSTDOWN) ||
		errors.Is(err, unix.EACCES) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EADDRNOTAVAIL)
}
