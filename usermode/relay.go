package usermode

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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
	// drainTimeout bounds how long the host may take to accept what a container sent before it reset the connection.
	drainTimeout = 5 * time.Second
)

// relay joins a netstack endpoint (the container's connection) and a connection of the host. Neither direction copies:
// up gives the container's segments to writev, down reads into what netstack will send. Nothing is held while
// nothing moves, apart from two goroutines.
type relay struct {
	ep    tcpip.Endpoint
	queue *waiter.Queue
	host  *net.TCPConn
	level *atomic.Int32 // how many times its buffers are halved

	once    sync.Once
	stopped chan struct{} // closed by abort
}

var errReset = errors.New("connection reset")

func newRelay(ep tcpip.Endpoint, queue *waiter.Queue, host *net.TCPConn, level *atomic.Int32) *relay {
	return &relay{ep: ep, queue: queue, host: host, level: level, stopped: make(chan struct{})}
}

// run relays until both sides have closed, one was reset, or ctx is done. It closes both.
func (r *relay) run(ctx context.Context) {
	defer context.AfterFunc(ctx, r.abort)()
	watch := waiter.NewFunctionEntry(waiter.EventHUp|waiter.EventErr, func(waiter.EventMask) { r.hungUp() })
	r.queue.EventRegister(&watch)
	defer r.queue.EventUnregister(&watch)

	var up sync.WaitGroup
	up.Go(func() {
		if r.up() != nil {
			r.abort()
		}
	})
	// After a reset by the container there may be data that up has not delivered yet; it stops by itself.
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
	r.host.SetLinger(0)
	r.host.Close()
}

// abort makes both directions stop where they are.
func (r *relay) abort() {
	r.once.Do(func() {
		close(r.stopped)
		r.host.SetDeadline(time.Unix(1, 0))
	})
}

// failed tells whether the container's connection was reset or timed out.
func (r *relay) failed() bool { return tcp.EndpointState(r.ep.State()) == tcp.StateError }

// hungUp is called when the container's connection has come to an end. If that was a reset, down, which may be
// waiting for the host, is told to stop, and up to hurry.
func (r *relay) hungUp() {
	if r.failed() {
		r.host.SetReadDeadline(time.Unix(1, 0))
		r.host.SetWriteDeadline(time.Now().Add(drainTimeout))
	}
}

// up carries what the container sends to the host, and its FIN.
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
			// The window grows for those only that need more: to one that is near, all of it is a queue before the TUN,
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
			return r.host.CloseWrite()
		}
		select {
		case <-ready:
		case <-r.stopped:
			return errReset
		}
	}
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
	b.rest = b.segments
	if _, err := b.rest.WriteTo(r.host); err != nil {
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
}

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
	*b = batch{segments: b.segments[:0]}
	batches.Put(b)
}

// down carries what the host sends to the container, and its FIN.
func (r *relay) down() error {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	r.queue.EventRegister(&entry)
	defer r.queue.EventUnregister(&entry)
	raw, err := r.host.SyscallConn()
	if err != nil {
		return err
	}
	in := inflow{}
	in.fillFn = in.fill
	defer in.drop()
	for {
		err := in.wait(raw)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := r.push(&in, ready); err != nil {
			return err
		}
	}
	if r.ep.Shutdown(tcpip.ShutdownWrite) != nil {
		return errReset
	}
	return nil
}

// push gives all of in to netstack, and waits on ready while netstack takes no more.
func (r *relay) push(in *inflow, ready <-chan struct{}) error {
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

// far tells whether the container is far away.
func (r *relay) far() bool {
	var info tcpip.TCPInfoOption
	return r.ep.GetSockOpt(&info) == nil && info.RTT > farAway
}

// resize gives netstack's send buffer, which is full, the size that it should have, and tells whether that is more.
//
// netstack would tune it as well, but throws away what it has taken for an endpoint when the buffer becomes smaller
// meanwhile. Here nobody is writing.
func (r *relay) resize() bool {
	opts := r.ep.SocketOptions()
	size, limit := opts.GetSendBufferSize(), int64(tcpSendMax)>>r.level.Load()
	want := size
	if r.far() {
		want *= 2
	}
	want = min(want, max(limit, tcpBufferMin))
	if want != size {
		opts.SetSendBufferSize(want, false)
	}
	return want > size
}

// inflow is what can be read from the host at the moment: a tcpip.Payloader that netstack reads straight into the
// buffers it will send from. Its length is exact, which netstack relies on: it asks the socket.
type inflow struct {
	fd     int
	block  *[relayHead]byte // where head is; nil if there is no head
	head   []byte           // read already
	queued int              // bytes that the socket has after head
	more   bool             // the last time there was more than a head
	err    error
	fillFn func(fd uintptr) bool // fill; made once
}

var blocks = sync.Pool{New: func() any { return new([relayHead]byte) }}

// wait waits until there is something to read. io.EOF says that nothing will come.
func (in *inflow) wait(raw syscall.RawConn) error {
	in.drop()
	if err := raw.Read(in.fillFn); err != nil {
		return err
	}
	return in.err
}

// fill looks what the socket has. It is a syscall.RawConn's callback: false asks to be called again when there is
// something.
func (in *inflow) fill(fd uintptr) bool {
	in.fd = int(fd)
	if in.more { // in a long transfer, spare the small read
		if n, err := unix.IoctlGetInt(in.fd, unix.TIOCINQ); err == nil && n > 0 {
			in.queued = min(n, relayBatch)
			return true
		}
		in.more = false
	}
	in.block = blocks.Get().(*[relayHead]byte)
	n, err := ignoringEINTR(func() (int, error) { return unix.Read(in.fd, in.block[:]) })
	if n <= 0 {
		in.drop()
	}
	switch {
	case err == unix.EAGAIN:
		return false
	case err != nil:
		in.err = err
	case n == 0:
		in.err = io.EOF
	default:
		in.head = in.block[:n]
	}
	if n == relayHead {
		if n, err := unix.IoctlGetInt(in.fd, unix.TIOCINQ); err == nil && n > 0 {
			in.queued, in.more = min(n, relayBatch), true
		}
	}
	return true
}

// drop lets go of the block.
func (in *inflow) drop() {
	if in.block != nil {
		blocks.Put(in.block)
	}
	in.block, in.head, in.queued = nil, nil, 0
}

// Len is how many bytes Read can give.
func (in *inflow) Len() int { return len(in.head) + in.queued }

// Read gives what there is. It is netstack that calls it, with 64 KiB and, to see whether the end is reached, with
// nothing.
func (in *inflow) Read(p []byte) (int, error) {
	n := copy(p, in.head)
	in.head = in.head[n:]
	if n == len(p) || in.queued == 0 {
		return n, nil
	}
	want := min(len(p)-n, in.queued)
	got, err := ignoringEINTR(func() (int, error) { return unix.Read(in.fd, p[n:n+want]) })
	if err != nil {
		return n, err
	}
	if got == 0 { // io.EOF would have netstack ask again for ever
		return n, io.ErrUnexpectedEOF
	}
	in.queued -= got
	return n + got, nil
}
