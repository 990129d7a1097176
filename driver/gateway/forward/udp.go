package forward

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
)

// datagrams is a UDP port: its sockets on the host, and a flow for each client.
type datagrams struct {
	*Forward
	network Network
	target  netip.AddrPort
	batches sync.Pool // of *batch

	mu    sync.Mutex
	flows *flowTable // nil: closed
}

// openUDP binds the sockets and starts to relay, which goes on until they are closed.
func (f *Forward) openUDP(ctx, running context.Context, spec gvproxy.Forward, n Network) error {
	sockets, err := listenUDP(ctx, spec.Local)
	if err != nil {
		return err
	}
	d := &datagrams{
		Forward: f,
		network: n,
		target:  spec.Target,
		batches: sync.Pool{New: func() any { return newBatch() }},
		flows:   newFlowTable(f.limits.flows, f.limits.idle),
	}
	f.shut = func() error {
		err := closeAll(sockets)
		d.close()
		return err
	}
	for _, s := range sockets {
		f.wg.Go(func() { d.receive(running, s) })
	}
	return nil
}

// close ends all flows, and lets no new ones come.
func (d *datagrams) close() {
	d.mu.Lock()
	flows := d.flows.flows
	d.flows = nil
	d.mu.Unlock()
	for _, f := range flows {
		f.conn.Close()
	}
}

// receive carries datagrams of clients to the network.
func (d *datagrams) receive(ctx context.Context, s *socket) {
	var p pause
	for {
		b, n, err := s.read(&d.batches)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			if p.wait(ctx) {
				d.log.Warn("cannot read datagrams for a while", "err", err)
			}
			continue
		}
		p.reset()
		for i := range n {
			d.deliver(s, b, i)
		}
		d.batches.Put(b)
	}
}

// deliver carries the i-th datagram of a batch. What does not arrive is lost, as UDP has it.
func (d *datagrams) deliver(s *socket, b *batch, i int) {
	m := &b.messages[i]
	client := addrPort(m.Addr)
	to, ok := s.destination(m.OOB[:m.NN])
	if !ok || !client.IsValid() {
		return
	}
	f, err := d.flow(flowKey{client, to}, s)
	if err != nil {
		d.log.Debug("flow failed", "client", client, "err", err)
		return
	}
	if f != nil {
		f.conn.Write(m.Buffers[0][:m.N])
	}
}

// flow is the one of key, a new one if need be; nil if the forward is closed. Only one goroutine asks for a client's flows:
// that of the socket of its family.
func (d *datagrams) flow(key flowKey, s *socket) (*flow, error) {
	d.mu.Lock()
	if d.flows == nil {
		d.mu.Unlock()
		return nil, nil
	}
	f := d.flows.use(key, time.Now())
	d.mu.Unlock()
	if f != nil {
		return f, nil
	}
	d.counters.accepted.Add(1)
	conn, err := d.network.DialUDP(key.client, d.target)
	if err != nil {
		d.counters.failed.Add(1)
		return nil, err
	}
	f = &flow{port: d, key: key, socket: s, source: s.source(key.local), conn: conn}
	if !d.add(f) {
		return nil, conn.Close()
	}
	d.counters.active.Add(1)
	d.wg.Go(f.answer)
	return f, nil
}

// add puts f into the table, and ends another one if there are too many. It returns false if the forward is closed.
func (d *datagrams) add(f *flow) bool {
	d.mu.Lock()
	if d.flows == nil {
		d.mu.Unlock()
		return false
	}
	evicted := d.flows.add(f, time.Now())
	d.mu.Unlock()
	if evicted != nil {
		evicted.conn.Close()
	}
	return true
}

// flow is what one client says to the target and hears from it.
type flow struct {
	port   *datagrams
	key    flowKey
	socket *socket
	source []byte   // a control message with the address that the client is answered from
	conn   net.Conn // the network's end

	entry // in the table
}

// maxDatagram is the most that an IPv4 or IPv6 datagram has, in bytes.
const maxDatagram = 65535

// maxErrors is how many errors in a row end a flow. Some only say that an earlier datagram did not arrive.
const maxErrors = 16

// answer carries datagrams of the network to the client, until the flow has been idle for too long or is closed.
func (f *flow) answer() {
	defer func() {
		f.conn.Close()
		f.remove()
		f.port.counters.active.Add(-1)
	}()
	for failed := 0; failed < maxErrors; failed++ {
		left, ok := f.left(time.Now())
		if !ok {
			return
		}
		f.conn.SetReadDeadline(time.Now().Add(left))
		n, err := f.carry()
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			return
		}
		if e, ok := errors.AsType[net.Error](err); n > 0 || ok && e.Timeout() {
			failed = 0
		}
	}
}

// carry carries datagrams to the client until there is an error, and returns how many bytes it has read.
func (f *flow) carry() (n int64, err error) {
	if from, ok := f.conn.(io.WriterTo); ok {
		return from.WriteTo(f)
	}
	buffer := make([]byte, maxDatagram)
	for {
		size, err := f.conn.Read(buffer)
		if err != nil {
			return n, err
		}
		n += int64(size)
		f.Write(buffer[:size])
	}
}

// Write sends a datagram to the client.
func (f *flow) Write(p []byte) (int, error) {
	f.touch(time.Now())
	if _, _, err := f.socket.WriteMsgUDPAddrPort(p, f.source, f.key.client); err != nil {
		f.port.log.Debug("datagram lost", "client", f.key.client, "err", err)
	}
	return len(p), nil
}

// touch notes that a datagram passes.
func (f *flow) touch(now time.Time) {
	f.port.mu.Lock()
	defer f.port.mu.Unlock()
	if f.port.flows != nil {
		f.port.flows.touch(f, now)
	}
}

// left is how long f may still be idle. It returns false when that has passed, or if f has been taken out of the table before;
// f is not in the table then.
func (f *flow) left(now time.Time) (time.Duration, bool) {
	f.port.mu.Lock()
	defer f.port.mu.Unlock()
	if f.port.flows == nil || !f.port.flows.has(f) {
		return 0, false
	}
	left := f.port.flows.left(f, now)
	if left <= 0 {
		f.port.flows.remove(f)
	}
	return left, left > 0
}

// remove takes f out of the table, if it is there.
func (f *flow) remove() {
	f.port.mu.Lock()
	defer f.port.mu.Unlock()
	if f.port.flows != nil {
		f.port.flows.remove(f)
	}
}
