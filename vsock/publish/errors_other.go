//go:build !windows

package publish

import "syscall"

// What the system says where a port cannot be had.
var (
	inUse        = []error{syscall.EADDRINUSE}
	notAllowed   = []error{syscall.EACCES, syscall.EPERM}
	noSuchFamily = []error{syscall.EAFNOSUPPORT, syscall.EADDRNOTAVAIL}
)
