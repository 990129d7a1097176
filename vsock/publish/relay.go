package publish

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
)

// relays are the connections of a port that have their streams.
type relays struct {
	kernel  kernel
	pairs   closers // those that goroutines carry
	running sync.WaitGroup
}

// join copies both ways until both directions have ended or the relays are closed, and calls done. It owns both connections.
func (r *relays) join(client *net.TCPConn, stream net.Conn, done func()) {
	if r.kernel.join(client, stream, done) {
		return
	}
	p := &pair{client: client, stream: stream}
	if !r.pairs.add(p) {
		done()
		return
	}
	r.running.Go(func() {
		p.run()
		r.pairs.remove(p)
		done()
	})
}

// close cuts all connections, and returns when they have ended.
func (r *relays) close() {
	r.kernel.close()
	r.pairs.close()
	r.running.Wait()
}

// Relay copies between a stream and the connection that it is for until both directions have ended or ctx is done. It closes both.
func Relay(ctx context.Context, stream, conn net.Conn) {
	p := &pair{client: conn, stream: stream}
	defer context.AfterFunc(ctx, func() { p.Close() })()
	p.run()
}

// pair is a connection and its stream.
type pair struct {
	client net.Conn
	stream net.Conn
	cut    sync.Once
}

// Close cuts the connection short.
func (p *pair) Close() error {
	p.cut.Do(func() {
		reset(p.client)
		reset(p.stream) // with what has not been read, where the system can tell the other end of it
	})
	return nil
}

// run relays until both directions have ended.
func (p *pair) run() {
	var up sync.WaitGroup
	up.Go(func() { p.direction(p.client, p.stream) })
	p.direction(p.stream, p.client)
	up.Wait()
	if c, ok := p.stream.(*chunked); ok {
		c.awaitEnd()
	}
	p.cut.Do(func() {
		p.client.Close()
		p.stream.Close()
	})
}

func (p *pair) direction(to, from net.Conn) {
	err := carry(to, from)
	if err == nil {
		err = closeWrite(to)
	}
	if err != nil {
		p.Close()
	}
}

// block is what carry copies by: large, for streams of hypervisors cost by the call.
type block [chunkHead + blockSize]byte

const blockSize = 256 << 10

var blocks = sync.Pool{New: func() any { return new(block) }}

// source is where carry reads from.
type source interface {
	await() error // waits until there is something to read, where the system tells
	Read(b []byte) (int, error)
}

func newSource(from io.Reader) source {
	if c, ok := from.(*chunked); ok {
		return c
	}
	return newInlet(from)
}

// sink is where carry writes to.
type sink struct {
	outlet *outlet
	chunks bool
}

func newSink(to io.Writer) sink {
	if c, ok := to.(*chunked); ok {
		return sink{newOutlet(c.Conn), true}
	}
	return sink{newOutlet(to), false}
}

// send sends the n bytes of b that begin behind the room for a chunk's length.
func (s sink) send(b *block, n int) error {
	if !s.chunks {
		return s.outlet.write(b[chunkHead : chunkHead+n])
	}
	binary.BigEndian.PutUint32(b[:], uint32(n))
	return s.outlet.write(b[:chunkHead+n])
}

// carry copies until the end of from. It reads and writes by itself, because io.Copy would prefer methods of the connections' that
// copy by smaller blocks where they cannot splice. Who has nothing to say has no block.
func carry(to io.Writer, from io.Reader) error {
	in, out := newSource(from), newSink(to)
	for {
		err := in.await()
		spliced := false
		if err == nil {
			spliced, err = sendSpliced(out, in)
		}
		if err == nil && !spliced {
			err = copySome(out, in)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// copySome copies what there is.
func copySome(out sink, in source) error {
	b := blocks.Get().(*block)
	defer blocks.Put(b)
	n, err := in.Read(b[chunkHead:])
	if n > 0 {
		if err := out.send(b, n); err != nil {
			return err
		}
	}
	return err
}

var errNoHalfClose = errors.New("the connection has no end of one direction")

func closeWrite(c net.Conn) error {
	h, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return errNoHalfClose
	}
	return h.CloseWrite()
}
