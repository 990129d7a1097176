package publish

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// chunksHeader is the field by which the host says that a stream's bytes travel in chunks.
const chunksHeader = "Usernet-Chunks"

// maxChunk is the most bytes that a chunk may have.
const maxChunk = 1 << 24

// endsOneWay tells whether one direction of a guest's connection can end alone. The sockets that hypervisors have for a guest's vsock
// take the end of one direction for that of both, or do not tell it at all: vhost-device-vsock does the one with what the host ends,
// and the other with what the guest does. Those are unix sockets.
func endsOneWay(conn net.Conn) bool {
	_, unix := conn.(*net.UnixConn)
	return !unix
}

// chunked is a stream whose bytes travel in chunks, so that each direction has an end of its own: each behind its length, 32 bits
// with the high byte first, and one of no bytes is the end. One goroutine may read while another one writes.
type chunked struct {
	net.Conn
	patient bool // leaves it to the other side to close the stream first, see awaitEnd

	in    *bufio.Reader
	left  int // bytes of the chunk that is being read
	ended bool

	head [4]byte
	out  net.Buffers
	both [2][]byte // what out begins as
}

// newChunked makes one of conn. in is where its bytes come from.
func newChunked(conn net.Conn, in io.Reader) *chunked {
	return &chunked{Conn: conn, in: bufio.NewReader(in)}
}

// Read reads bytes of one chunk. The error is io.EOF only at the direction's own end: a stream that ends before was cut short.
func (c *chunked) Read(b []byte) (int, error) {
	if c.left == 0 && !c.ended {
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	if c.ended {
		return 0, io.EOF
	}
	b = b[:min(len(b), c.left)]
	n, err := c.in.Read(b[:min(len(b), c.in.Buffered())])
	if err == nil && n < len(b) { // the rest of the chunk is on its way, if it is not there: it was whole when it was sent
		var more int
		more, err = c.in.Read(b[n:])
		n += more
	}
	c.left -= n
	if n > 0 {
		return n, nil // an error will come again
	}
	return 0, cutShort(err)
}

// next reads the length of the next chunk.
func (c *chunked) next() error {
	head, err := c.in.Peek(4)
	if err != nil {
		return cutShort(err)
	}
	n := binary.BigEndian.Uint32(head)
	if n > maxChunk {
		return fmt.Errorf("a chunk of %d bytes", n)
	}
	c.in.Discard(4)
	c.left, c.ended = int(n), n == 0
	return nil
}

func cutShort(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Write sends b as one chunk, or some.
func (c *chunked) Write(b []byte) (written int, err error) {
	for len(b) > 0 {
		part := b[:min(len(b), maxChunk)]
		binary.BigEndian.PutUint32(c.head[:], uint32(len(part)))
		c.both = [2][]byte{c.head[:], part}
		c.out = c.both[:]
		n, err := c.out.WriteTo(c.Conn)
		written += max(int(n)-len(c.head), 0)
		if err != nil {
			return written, err
		}
		b = b[len(part):]
	}
	return written, nil
}

// CloseWrite ends the direction.
func (c *chunked) CloseWrite() error {
	_, err := c.Conn.Write(make([]byte, 4))
	return err
}

// awaitEnd waits for the other side to close the stream, when both directions have ended. A device may lose what it still holds
// for the host when the guest closes first.
func (c *chunked) awaitEnd() {
	if c.patient {
		io.Copy(io.Discard, c.in)
	}
}
