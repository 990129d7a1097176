package tcprelay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// relayBatch is how many bytes one direction moves at a time: enough that system calls do not matter, and little
	// enough to stay in the processor's cache.
	relayBatch = 256 << 10
	// relayHead is what is read from the host before asking how much there is. Most messages are shorter.
	relayHead = 4 << 10
	// relayChunk is how much is written at a time to what is no socket.
	relayChunk = 64 << 10
	// drainTimeout bounds how long the host may take to accept what a client sent before it reset the connection.
	drainTimeout = 5 * time.Second
)

// relay joins a netstack endpoint (the client's connection) and a connection of the host. Where that is a socket, neither direction
// copies: up gives the client's segments to writev, down reads into what netstack will send (on Linux). Nothing is held while
// nothing moves, apart from two goroutines.
type relay struct {
	ep    tcpip.Endpoint
	queue *waiter.Queue
	host  conn
	level *atomic.Int32 // how many times its buffers are halved
	crew  *crew
	near  atomic.Bool
	ended atomic.Bool // all that the host sends has been taken

	once    sync.Once
	stopped chan struct{} // closed by abort
}

// conn is a connection of the host's: a net.Conn, of which nobody asks the addresses.
type conn interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

var errReset = errors.New("connection reset")

func newRelay(ep tcpip.Endpoint, queue *waiter.Queue, host conn, level *atomic.Int32, c *crew) *relay {
	return &relay{ep: ep, queue: queue, host: host, level: level, crew: c, stopped: make(chan struct{})}
}

// run relays until both sides have closed, one was reset, or ctx is done. It closes both.
func (r *relay) run(ctx context.Context) {
	defer context.AfterFunc(ctx, r.abort)()
	r.far() // now, with the handshake's round trip
	watch := waiter.NewFunctionEntry(waiter.EventHUp|waiter.EventErr, func(waiter.EventMask) { r.hungUp() })
	r.queue.EventRegister(&watch)
	defer r.queue.EventUnregister(&watch)

	var up sync.WaitGroup
	up.Add(1)
	r.crew.do(func() {
		defer up.Done()
		if r.up() != nil {
			r.abort()
		}
	})
	// After a reset by the client there may be data that up has not delivered yet; it stops by itself.
	if r.down() != nil && !r.failed() {
		r.abort()
	}
	up.Wait()

	select {
	case <-r.stopped:
		r.reset()
	default:
		if r.failed() {
			r.reset()
			return
		}
		r.ep.Close()
		r.host.Close()
	}
}

// reset closes both sides with a reset, so that neither takes a broken-off transfer for a complete one.
func (r *relay) reset() {
	r.ep.Abort()
	reset(r.host)
}

// reset closes a connection of the host with a reset, if it is one that can.
func reset(host conn) {
	if c, ok := host.(interface{ SetLinger(sec int) error }); ok {
		c.SetLinger(0)
	}
	host.Close()
}

// abort makes both directions stop where they are.
func (r *relay) abort() {
	r.once.Do(func() {
		close(r.stopped)
		if r.host.SetDeadline(time.Unix(1, 0)) != nil {
			r.host.Close() // it has no deadlines
		}
	})
}

// failed tells whether the client's connection was reset or timed out.
func (r *relay) failed() bool { return tcp.EndpointState(r.ep.State()) == tcp.StateError }

// hungUp is called when the client's connection has come to an end. If that was a reset, down, which may be
// waiting for the host, is told to stop, and up to hurry.
func (r *relay) hungUp() {
	if !r.failed() {
		return
	}
	if r.host.SetReadDeadline(time.Unix(1, 0)) != nil {
		r.host.Close()
		return
	}
	r.host.SetWriteDeadline(time.Now().Add(drainTimeout))
}

// up carries what the client sends to the host, and its FIN.
func (r *relay) up() error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	r.queue.EventRegister(&entry)
	defer r.queue.EventUnregister(&entry)
	var total int
	var asked, far bool
	for {
		n, err := r.forward()
		if err != nil {
			return err
		}
		if n > 0 {
			// The window grows for those only that need more: to one that is near, all of it is a queue before its link,
			// in which everybody's packets wait.
			if total += n; total > growAfter && !asked {
				asked, far = true, r.far()
			}
			if far {
				r.ep.ModerateRecvBuf(n)
			}
			continue
		}
		if n < 0 {
			return r.closeWrite()
		}
		select {
		case <-ready:
		case <-r.stopped:
			return errReset
		}
	}
}

// closeWrite tells the host that the client has ended. Where the host has ended too, run's Close does.
func (r *relay) closeWrite() error {
	if r.ended.Load() {
		return nil
	}
	if c, ok := r.host.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return r.host.Close() // all has been written; who waited for the end on it would wait for ever
}

// forward writes what netstack has to the host and tells how many bytes that was: 0 when there is nothing yet, -1 when
// there will be nothing more.
//
// The segments stay in netstack's queue while they are written, and their memory is used without the endpoint's lock.
// Only reading from the endpoint, Close and Abort release them, and nobody else does any of that before up returns.
func (r *relay) forward() (int, error) {
	b := batches.Get().(*batch)
	defer b.free()
	switch _, err := r.ep.Read(b, tcpip.ReadOptions{Peek: true}); err.(type) {
	case nil:
	case *tcpip.ErrWouldBlock:
		return 0, nil
	case *tcpip.ErrClosedForReceive:
		return -1, nil
	default:
		return 0, errReset
	}
	if err := b.writeTo(r.host); err != nil {
		return 0, err
	}
	b.done = tcpip.LimitedWriter{W: io.Discard, N: int64(b.size)}
	if _, err := r.ep.Read(&b.done, tcpip.ReadOptions{}); err != nil {
		return 0, errReset
	}
	return b.size, nil
}

// batch collects segments, without copying them, when an endpoint is read into it.
type batch struct {
	segments net.Buffers
	rest     net.Buffers
	size     int
	done     tcpip.LimitedWriter // takes them away
	vector   vector
}

// writeChunks writes the segments in large pieces.
func (b *batch) writeChunks(host io.Writer) error {
	b.rest = b.segments
	chunk := chunks.Get().(*[relayChunk]byte)
	defer chunks.Put(chunk)
	for left := b.size; left > 0; {
		n, _ := io.ReadFull(&b.rest, chunk[:min(left, relayChunk)])
		if _, err := host.Write(chunk[:n]); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

var chunks = sync.Pool{New: func() any { return new([relayChunk]byte) }}

var batches = sync.Pool{New: func() any { return new(batch) }}

var errFull = errors.New("batch is full")

func (b *batch) Write(p []byte) (int, error) {
	if b.size >= relayBatch || len(b.segments) == maxIovecs {
		return 0, errFull
	}
	b.segments = append(b.segments, p)
	b.size += len(p)
	return len(p), nil
}

// maxIovecs is how many segments fit into one writev (UIO_MAXIOV).
const maxIovecs = 1024

func (b *batch) free() {
	clear(b.segments)
	b.segments, b.rest, b.size, b.done = b.segments[:0], nil, 0, tcpip.LimitedWriter{}
	b.vector.reset()
	batches.Put(b)
}

// down carries what the host sends to the client, and its FIN.
func (r *relay) down() error {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	r.queue.EventRegister(&entry)
	defer r.queue.EventUnregister(&entry)
	in, err := newInflow(r.host)
	if err != nil {
		return err
	}
	defer in.drop()
	for {
		err := in.wait()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := r.push(in, ready); err != nil {
			return err
		}
	}
	r.ended.Store(true)
	if r.ep.Shutdown(tcpip.ShutdownWrite) != nil {
		return errReset
	}
	return nil
}

// push gives all of in to netstack, and waits on ready while netstack takes no more.
func (r *relay) push(in inflow, ready <-chan struct{}) error {
	for in.Len() > 0 {
		_, err := r.ep.Write(in, tcpip.WriteOptions{})
		if err == nil {
			continue
		}
		if _, full := err.(*tcpip.ErrWouldBlock); !full {
			return errReset
		}
		if r.resize() {
			continue
		}
		select {
		case <-ready:
		case <-r.stopped:
			return errReset
		}
	}
	return nil
}

const (
	// farAway is the round trip above which a connection may need more than the usual buffers.
	farAway = 20 * time.Millisecond
	// growAfter is how many bytes a connection has to carry before anybody asks whether it needs more.
	growAfter = 256 << 10
)

// far tells whether the client is far away. Who was near once is so for ever: that its round trip has become longer since is the work of
// a queue on the way, which larger buffers would only make longer yet.
func (r *relay) far() bool {
	if r.near.Load() {
		return false
	}
	var info tcpip.TCPInfoOption
	if r.ep.GetSockOpt(&info) != nil {
		return false
	}
	if info.RTT > 0 && info.RTT <= farAway {
		r.near.Store(true)
	}
	return info.RTT > farAway
}

// resize gives netstack's send buffer, which is full, the size that it should have, and tells whether that is more.
//
// netstack would tune it as well, but throws away what it has taken for an endpoint when the buffer becomes smaller
// meanwhile. Here nobody is writing.
func (r *relay) resize() bool {
	opts := r.ep.SocketOptions()
	size, limit := opts.GetSendBufferSize(), int64(sendMax)>>r.level.Load()
	want := size
	if r.far() {
		want *= 2
	}
	want = min(want, max(limit, bufferMin))
	if want != size {
		opts.SetSendBufferSize(want, false)
	}
	return want > size
}
