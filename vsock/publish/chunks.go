package publish

import (
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

// chunkHead is the length of a chunk's length.
const chunkHead = 4

// chunked is a stream whose bytes travel in chunks, so that each direction has an end of its own: each behind its length, 32 bits
// with the high byte first, and one of no bytes is the end. One goroutine may read while another one writes.
type chunked struct {
	net.Conn
	patient bool // leaves it to the other side to close the stream first, see awaitEnd

	in    *inlet
	room  [4 << 10]byte // what is read before it is known how much is wanted
	ahead []byte        // of it, or what came too early: read, and not looked at yet
	left  int           // bytes of the chunk that is being read
	ended bool

	head [chunkHead]byte
	out  net.Buffers
	both [2][]byte // what out begins as
}

// newChunked makes one of conn. in is where its bytes come from, behind early.
func newChunked(conn net.Conn, early []byte, in io.Reader) *chunked {
	return &chunked{Conn: conn, in: newInlet(in), ahead: early}
}

// Read reads bytes of one chunk. The error is io.EOF only at the direction's own end: a stream that ends before was cut short.
func (c *chunked) Read(b []byte) (int, error) {
	if err := c.next(); err != nil {
		return 0, err
	}
	b = b[:min(len(b), c.left)]
	n := copy(b, c.ahead)
	c.ahead, c.left = c.ahead[n:], c.left-n
	if b = b[n:]; len(b) == 0 {
		return n, nil
	}
	// Behind a large chunk only the next length is read with it, so that no payload has to be copied again.
	var room []byte
	if len(b) == c.left {
		room = c.room[:]
		if len(b) >= len(room) {
			room = room[:chunkHead]
		}
	}
	got, err := c.in.read(b, room, n == 0)
	more := min(got, len(b))
	c.ahead, c.left = room[:got-more], c.left-more
	if n += more; n > 0 {
		return n, nil // an error will come again
	}
	return 0, cutShort(err)
}

// next reads the length of the next chunk, unless there is more of the last one. The error is io.EOF at the direction's end.
func (c *chunked) next() error {
	for c.left == 0 && !c.ended {
		if len(c.ahead) < chunkHead {
			have := copy(c.room[:], c.ahead)
			n, err := c.in.read(nil, c.room[have:], true)
			if c.ahead = c.room[:have+n]; n == 0 && err != nil {
				return cutShort(err)
			}
			continue
		}
		n := binary.BigEndian.Uint32(c.ahead)
		if n > maxChunk {
			return fmt.Errorf("a chunk of %d bytes", n)
		}
		c.ahead = c.ahead[chunkHead:]
		c.left, c.ended = int(n), n == 0
	}
	if c.ended {
		return io.EOF
	}
	return nil
}

// await waits until there is something to Read.
func (c *chunked) await() error {
	if err := c.next(); err != nil || len(c.ahead) > 0 {
		return err
	}
	return c.in.await()
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
		written += max(int(n)-chunkHead, 0)
		if err != nil {
			return written, err
		}
		b = b[len(part):]
	}
	return written, nil
}

// CloseWrite ends the direction.
func (c *chunked) CloseWrite() error {
	_, err := c.Conn.Write(make([]byte, chunkHead))
	return err
}

// awaitEnd waits for the other side to close the stream, when both directions have ended. A device may lose what it still holds
// for the host when the guest closes first.
func (c *chunked) awaitEnd() {
	if c.patient {
		io.Copy(io.Discard, c.Conn)
	}
}
