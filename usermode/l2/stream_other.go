//go:build !linux

package l2

import (
	"io"
	"net"
)

// widen makes room for a window of bytes in a unix socket.
func widen(c net.Conn) {
	if u, ok := c.(*net.UnixConn); ok {
		u.SetWriteBuffer(window)
	}
}

func directly(r io.Reader) io.Reader { return r }

func (s *streamWriter) writeAll(b []byte) error {
	_, err := s.w.Write(b)
	return err
}

func (s *streamWriter) writeOn(uintptr) bool { return true }

// vector is nothing: frames go by way of what is pending.
type vector []struct{}

func (v vector) with([]byte) vector { return v }

func writeVectorNow(uintptr, vector) (int, error) { return 0, nil }
