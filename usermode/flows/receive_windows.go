package flows

import (
	"errors"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/windows"
)

// anyPort is for the system to choose.
var anyPort netip.AddrPort

// receiveSome waits for a datagram and receives it. The wait is package net's peek at nothing, and needs no memory.
func (f *udpFlow) receiveSome() error {
	raw, err := f.conn.SyscallConn()
	if err != nil {
		return err
	}
	waited := false
	err = raw.Read(func(uintptr) bool {
		ready := waited
		waited = true
		return ready
	})
	if err != nil {
		return err
	}
	b := buffers.Get().(*[maxDatagram]byte)
	defer buffers.Put(b)
	n, err := f.conn.Read(b[:])
	if err == nil {
		f.received(b[:n])
	}
	return err
}

// noBroadcast takes back what package net sets.
func noBroadcast(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		err := windows.SetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_BROADCAST, 0)
		failed = os.NewSyscallError("clear SO_BROADCAST", err)
	})
	return errors.Join(err, failed)
}

// isRefused tells whether err is that nobody listens where an earlier datagram went, which Windows calls a reset.
func isRefused(err error) bool {
	return errors.Is(err, windows.WSAECONNRESET) || errors.Is(err, windows.WSAECONNREFUSED)
}

// isExhausted tells whether err is that the process or the host has no more sockets.
func isExhausted(err error) bool {
	return errors.Is(err, windows.WSAEMFILE) || errors.Is(err, windows.WSAENOBUFS)
}

// isUnreachable tells whether err is that no way leads to a destination.
func isUnreachable(err error) bool {
	return errors.Is(err, windows.WSAENETUNREACH) || errors.Is(err, windows.WSAEHOSTUNREACH) ||
		errors.Is(err, windows.WSAENETRESET) || errors.Is(err, windows.WSAEACCES) ||
		errors.Is(err, windows.WSAEINVAL) || errors.Is(err, windows.WSAEADDRNOTAVAIL)
}
