package publish

import (
	"net"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

// kernel relays by event loops and splice(2).
type kernel struct{ group splice.Group }

// join takes both connections over, if it can.
func (k *kernel) join(client *net.TCPConn, stream net.Conn, done func()) bool {
	b, ok := Descriptor(stream)
	if !ok {
		return false
	}
	a, ok := Descriptor(client)
	if !ok {
		unix.Close(b)
		return false
	}
	client.Close()
	stream.Close()
	k.group.Join(a, b, done)
	return true
}

func (k *kernel) close() { k.group.Close() }

// Descriptor returns a non-blocking descriptor of a stream's own socket, beside the one that conn keeps, for those who would
// rather splice; the caller closes both. It has none of what is more than a socket.
//
// AF_VSOCK has no splice of its own, and yet splice(2) takes it: the kernel copies.
func Descriptor(conn net.Conn) (fd int, ok bool) {
	raw := rawConn(conn)
	if raw == nil {
		return -1, false
	}
	err := raw.Control(func(n uintptr) {
		var dupErr error
		fd, dupErr = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0)
		ok = dupErr == nil
	})
	return fd, ok && err == nil
}
