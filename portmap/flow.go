package portmap

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// flowKey tells flows apart. A client may speak to several of the host's addresses from one socket; those are
// separate flows, since each must be answered from the address it was sent to.
type flowKey struct {
	client netip.AddrPort
	local  destination // zero: the listener has one address only
}

// flow is what one client says to the container and hears from it.
type flow struct {
	key      flowKey
	listener *net.UDPConn
	source   []byte // control message that makes replies leave from key.local
	conn     *net.UDPConn
	raw      syscall.RawConn
	last     atomic.Int64 // when the last packet passed either way, on the table's clock
}

func (r *server) newFlow(key flowKey, ln *net.UDPConn, target netip.AddrPort) (*flow, error) {
	conn, err := r.dialer.DialUDP(key.client, target)
	if err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &flow{key: key, listener: ln, source: key.local.control(), conn: conn, raw: raw}, nil
}

// send passes a datagram to the container. What does not fit or cannot be routed is lost, as on any network.
func (f *flow) send(b []byte) {
	_, err := f.conn.Write(b)
	if errors.Is(err, unix.ECONNREFUSED) {
		// That was the ICMP answer to an earlier datagram; this one has not been sent.
		f.conn.Write(b)
	}
}

// serveFlow carries the container's datagrams to the client until the flow has been idle for too long, was evicted,
// or ctx ends.
func (r *server) serveFlow(ctx context.Context, f *flow, flows *flowTable) {
	defer context.AfterFunc(ctx, func() { f.conn.Close() })()
	defer f.conn.Close()
	defer flows.remove(f)
	r.counters.accepted.Add(1)
	r.counters.active.Add(1)
	defer r.counters.active.Add(-1)

	in := newReceiver(f.raw, r.datagrams)
	f.conn.SetReadDeadline(time.Now().Add(flows.idle))
	for {
		buf, n, err := in.receive()
		switch {
		case err == nil:
			f.last.Store(flows.now())
			f.listener.WriteMsgUDPAddrPort(buf[:n], f.source, f.key.client)
			r.datagrams.Put(buf)
		case errors.Is(err, os.ErrDeadlineExceeded):
			left := flows.expire(f)
			if left == 0 {
				return
			}
			f.conn.SetReadDeadline(time.Now().Add(left))
		case !isICMP(err):
			return
		}
	}
}

// isICMP reports whether err only says that an earlier datagram did not arrive; see icmp(7).
func isICMP(err error) bool {
	errno, _ := err.(syscall.Errno)
	switch errno {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET,
		unix.ENOPROTOOPT, unix.EMSGSIZE, unix.EOPNOTSUPP, unix.EPROTO, unix.EACCES:
		return true
	}
	return false
}

// receiver reads a connected UDP socket into pooled datagrams: an idle one holds no buffer, which net.UDPConn's own
// methods would ask for before there is anything to read.
type receiver struct {
	raw syscall.RawConn
	try func(fd uintptr) bool // made once: a closure for each datagram would be garbage
	buf *datagram
	n   int
	err error
}

func newReceiver(raw syscall.RawConn, pool *sync.Pool) *receiver {
	in := &receiver{raw: raw}
	in.try = func(fd uintptr) bool {
		in.buf = pool.Get().(*datagram)
		for {
			in.n, in.err = unix.Read(int(fd), in.buf[:])
			if in.err != unix.EINTR {
				break
			}
		}
		if in.err != nil {
			pool.Put(in.buf)
		}
		return in.err != unix.EAGAIN
	}
	return in
}

// receive waits for a datagram. The caller puts the buffer back.
func (in *receiver) receive() (buf *datagram, n int, err error) {
	if err := in.raw.Read(in.try); err != nil {
		return nil, 0, err
	}
	return in.buf, in.n, in.err
}

// flowTable is the flows of one forward.
type flowTable struct {
	max   int
	idle  time.Duration
	start time.Time // when its clock was 0

	mu    sync.Mutex
	flows map[flowKey]*flow
}

func newFlowTable(l limits) *flowTable {
	return &flowTable{max: l.flows, idle: l.idle, start: time.Now(), flows: make(map[flowKey]*flow)}
}

// now is the table's clock: monotonic, in nanoseconds.
func (t *flowTable) now() int64 { return int64(time.Since(t.start)) }

// use returns the flow of key, or nil, and notes that a packet passes.
func (t *flowTable) use(key flowKey) *flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.flows[key]
	if f != nil {
		// Under the lock, so that expire cannot end the flow between the look-up and the packet.
		f.last.Store(t.now())
	}
	return f
}

// add puts a new flow in, and ends the one that has been idle for longest where there would be too many.
func (t *flowTable) add(f *flow) {
	f.last.Store(t.now())
	t.mu.Lock()
	var oldest *flow
	if len(t.flows) >= t.max {
		for _, o := range t.flows {
			if oldest == nil || o.last.Load() < oldest.last.Load() {
				oldest = o
			}
		}
		delete(t.flows, oldest.key)
	}
	t.flows[f.key] = f
	t.mu.Unlock()
	if oldest != nil {
		oldest.conn.Close()
	}
}

// expire takes f out if it has been idle for long enough; otherwise it returns how long that still is.
func (t *flowTable) expire(f *flow) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if left := t.idle - time.Duration(t.now()-f.last.Load()); left > 0 {
		return left
	}
	t.removeLocked(f)
	return 0
}

func (t *flowTable) remove(f *flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.removeLocked(f)
}

func (t *flowTable) removeLocked(f *flow) {
	if t.flows[f.key] == f {
		delete(t.flows, f.key)
	}
}
