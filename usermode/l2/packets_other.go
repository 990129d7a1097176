//go:build !linux

package l2

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"syscall"
	"time"
)

// packets receives and sends on a socket whose packets are frames.
type packets struct {
	conn  PacketConn
	buf   []byte
	frame [1]Frame
	bad   uint64
}

func newPackets(c PacketConn, _ syscall.RawConn, _ Options) *packets {
	return &packets{conn: c, buf: make([]byte, MaxFrame+1)}
}

func (p *packets) dropped() uint64 { return p.bad }

func (p *packets) receive() ([]Frame, error) {
	for {
		n, err := p.conn.Read(p.buf)
		if err != nil {
			return nil, err
		}
		if n == 0 && p.conn.LocalAddr().Network() == "unixpacket" {
			return nil, io.EOF
		}
		if n < headerLen || n > MaxFrame {
			p.bad++
			continue
		}
		p.frame[0] = Frame{Head: p.buf[:n]}
		return p.frame[:], nil
	}
}

// try leaves everything to write.
func (p *packets) try([]byte) (int, error) { return 0, nil }

// patience is how long write waits for a receiver that has no room. Where ENOBUFS says so, nothing tells when there is some.
const patience = 20 * time.Millisecond

func (p *packets) write(b []byte) error {
	for len(b) > 0 {
		n := 4 + int(binary.BigEndian.Uint32(b))
		for start := time.Now(); ; time.Sleep(200 * time.Microsecond) {
			_, err := p.conn.Write(b[4:n])
			if err == nil || errors.Is(err, syscall.EMSGSIZE) {
				break
			}
			if !errors.Is(err, syscall.ENOBUFS) || errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
			if time.Since(start) > patience {
				break // lost, as on a wire
			}
		}
		b = b[n:]
	}
	return nil
}
