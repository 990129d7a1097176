package publish

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// MaxDatagram is the most bytes that a datagram can have on a stream. UDP's are shorter.
const MaxDatagram = 1<<16 - 1

// AppendDatagram appends a datagram to b as it is sent on a stream. What is longer than MaxDatagram is cut.
func AppendDatagram(b, payload []byte) []byte {
	payload = payload[:min(len(payload), MaxDatagram)]
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	return append(b, payload...)
}

// ReadDatagram reads a datagram of a stream into b, which has room for MaxDatagram bytes, and returns its length. The error is
// io.EOF only between two.
func ReadDatagram(r *bufio.Reader, b []byte) (int, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return 0, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(r, b[:n]); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, err
	}
	return n, nil
}

// CarryDatagrams relays between a stream and a connected datagram socket until the stream ends, nothing has passed for
// FlowIdle, or ctx is done. It closes both. Of the socket's errors those that only say that a datagram has not arrived
// are passed over.
func CarryDatagrams(ctx context.Context, stream, socket net.Conn) {
	ctx, end := context.WithCancel(ctx)
	closed := make(chan struct{})
	context.AfterFunc(ctx, func() {
		stream.Close()
		socket.Close()
		close(closed)
	})
	defer func() { <-closed }()
	defer end()
	var last atomic.Int64
	last.Store(time.Now().UnixNano())
	idle := newIdle(&last, end)
	defer idle.stop()
	var answers sync.WaitGroup
	defer answers.Wait()
	defer end()
	answers.Go(func() {
		defer end()
		frameDatagrams(stream, socket, &last)
	})
	r := bufio.NewReaderSize(stream, 64<<10)
	b := make([]byte, MaxDatagram)
	for {
		n, err := ReadDatagram(r, b)
		if err != nil {
			return
		}
		last.Store(time.Now().UnixNano())
		socket.Write(b[:n])
	}
}

// frameDatagrams sends what the socket hears on the stream, until either is closed.
func frameDatagrams(stream, socket net.Conn, last *atomic.Int64) {
	b := make([]byte, MaxDatagram)
	var out []byte
	for {
		n, err := socket.Read(b)
		switch {
		case errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
			return
		case err != nil:
			continue // the kernel tells an ICMP error once
		}
		last.Store(time.Now().UnixNano())
		out = AppendDatagram(out[:0], b[:n])
		if _, err := stream.Write(out); err != nil {
			return
		}
	}
}
