package publish

import "golang.org/x/sys/windows"

// What the system says where a port cannot be had.
var (
	inUse        = []error{windows.WSAEADDRINUSE}
	notAllowed   = []error{windows.WSAEACCES} // also of what winnat has reserved
	noSuchFamily = []error{windows.WSAEAFNOSUPPORT, windows.WSAEADDRNOTAVAIL}
)
