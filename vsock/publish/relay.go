package publish

import (
	"context"
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

// blocks are what carry copies by: large ones, for streams of hypervisors cost by the call.
var blocks = sync.Pool{New: func() any { return new([256 << 10]byte) }}

// carry copies until the end of from. It calls Read and Write by itself, because io.Copy would prefer methods of the
// connections' that copy by smaller blocks where they cannot splice.
func carry(to io.Writer, from io.Reader) error {
	b := blocks.Get().(*[256 << 10]byte)
	defer blocks.Put(b)
	for {
		n, err := from.Read(b[:])
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

var errNoHalfClose = errors.New("the connection has no end of one direction")

func closeWrite(c net.Conn) error {
	h, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return errNoHalfClose
	}
	return h.CloseWrite()
}
