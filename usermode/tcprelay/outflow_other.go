//go:build !linux

package tcprelay

import (
	"io"
	"net"
)

// vector is not needed: package net has its own.
type vector struct{}

func (*vector) reset() {}

// writeTo writes the segments: to a socket as they are, to anything else in large pieces.
func (b *batch) writeTo(host io.Writer) error {
	switch host.(type) {
	case *net.TCPConn, *net.UnixConn:
		b.rest = b.segments
		_, err := b.rest.WriteTo(host)
		return err
	}
	return b.writeChunks(host)
}
