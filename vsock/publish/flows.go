package publish

import (
	"bufio"
	"container/list"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet/vsock/proxy"
)

const (
	maxFlows   = 4096      // of one socket; the idlest goes when there are more
	maxPending = 256 << 10 // bytes of datagrams that wait for a flow's stream; more are lost
)

// flows is a UDP socket of a port with its clients.
type flows struct {
	port *hostPort
	conn *net.UDPConn
	at   destination // how datagrams tell where they were sent to

	mu    sync.Mutex
	flows map[flowKey]*flow
	order list.List // of *flow, the last used one first
}

// flowKey tells flows apart: what a client sends to another address of the host has to be answered from there.
type flowKey struct {
	client netip.AddrPort
	local  netip.Addr
}

// flow is what one client says to the guest and hears from it, on a stream of its own.
type flow struct {
	flows  *flows
	key    flowKey
	source []byte // the control message that has answers leave from key.local
	place  *list.Element
	last   atomic.Int64 // UnixNano of the last datagram either way

	mu      sync.Mutex
	pending []byte // as they go onto the stream
	more    chan struct{}
	ended   chan struct{}
	end     func()
}

func newFlows(p *hostPort, conn *net.UDPConn) *flows {
	// As much as the system allows: one socket for all clients.
	conn.SetReadBuffer(4 << 20)
	conn.SetWriteBuffer(4 << 20)
	return &flows{port: p, conn: conn, at: newDestination(conn), flows: make(map[flowKey]*flow)}
}

// serve carries what clients send, until the port is closed.
func (u *flows) serve() {
	b := make([]byte, MaxDatagram)
	oob := make([]byte, 256)
	var rest pause
	for {
		n, oobn, _, from, err := u.conn.ReadMsgUDPAddrPort(b, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			rest.wait(u.port.ctx) // Windows also tells here that an answer found nobody
			continue
		}
		rest = 0
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		local, ok := u.at.parse(oob[:oobn])
		if !ok {
			continue // not for this host alone
		}
		if f := u.flow(flowKey{from, local}); f != nil {
			f.push(b[:n])
		}
	}
}

// flow returns the flow of a client, a new one if need be; nil: there is none to be had.
func (u *flows) flow(k flowKey) *flow {
	u.mu.Lock()
	defer u.mu.Unlock()
	if f := u.flows[k]; f != nil {
		u.order.MoveToFront(f.place)
		return f
	}
	done, err := u.port.enter()
	if err != nil {
		u.port.refused.Add(1)
		return nil
	}
	if len(u.flows) >= maxFlows {
		idlest := u.order.Back().Value.(*flow)
		u.dropLocked(idlest)
		idlest.end()
	}
	f := &flow{flows: u, key: k, source: u.at.control(k.local), more: make(chan struct{}, 1), ended: make(chan struct{})}
	f.end = sync.OnceFunc(func() { close(f.ended) })
	f.place = u.order.PushFront(f)
	u.flows[k] = f
	u.port.running.Go(func() {
		f.run()
		u.mu.Lock()
		u.dropLocked(f)
		u.mu.Unlock()
		done()
	})
	return f
}

// dropLocked forgets a flow, if that has not been done.
func (u *flows) dropLocked(f *flow) {
	if u.flows[f.key] == f {
		delete(u.flows, f.key)
		u.order.Remove(f.place)
	}
}

// push sends a datagram to the guest as soon as it can be.
func (f *flow) push(payload []byte) {
	f.last.Store(time.Now().UnixNano())
	f.mu.Lock()
	if len(f.pending)+len(payload)+2 <= maxPending {
		f.pending = AppendDatagram(f.pending, payload)
	}
	f.mu.Unlock()
	select {
	case f.more <- struct{}{}:
	default:
	}
}

// run serves the flow until it has been idle for too long, or something ends it.
func (f *flow) run() {
	target := addrPort(f.flows.conn.LocalAddr())
	if f.key.local.IsValid() {
		target = netip.AddrPortFrom(f.key.local, target.Port())
	}
	p := f.flows.port
	s, err := p.session.open(p.ctx.Done(), proxy.Header{Datagram: true, Client: f.key.client, Target: target})
	if err != nil {
		p.refused.Add(1)
		p.session.server.cfg.Log.Debug("refused a flow", "port", p.port, "client", f.key.client, "err", err)
		return
	}
	p.accepted.Add(1)
	idle := newIdle(&f.last, f.end)
	defer idle.stop()
	var answers sync.WaitGroup
	defer answers.Wait()
	defer s.conn.Close()
	answers.Go(func() {
		defer f.end()
		f.answer(s.conn)
	})
	stopped := make(chan struct{})
	defer func() { <-stopped }()
	defer f.end()
	go func() {
		defer close(stopped)
		select {
		case <-f.ended:
		case <-p.ctx.Done():
		}
		s.conn.Close() // ends a Write that the guest does not take
	}()
	var batch []byte
	for {
		select {
		case <-f.more:
		case <-f.ended:
			return
		case <-p.ctx.Done():
			return
		}
		f.mu.Lock()
		batch, f.pending = f.pending, batch[:0]
		f.mu.Unlock()
		if _, err := s.conn.Write(batch); err != nil {
			return
		}
	}
}

// answer sends the client what the guest says, until the stream ends.
func (f *flow) answer(stream net.Conn) {
	r := bufio.NewReaderSize(stream, 64<<10)
	b := make([]byte, MaxDatagram)
	for {
		n, err := ReadDatagram(r, b)
		if err != nil {
			return
		}
		f.last.Store(time.Now().UnixNano())
		// What cannot be sent is lost, as datagrams are.
		f.flows.conn.WriteMsgUDPAddrPort(b[:n], f.source, f.key.client)
	}
}

// idle ends something after a time without a datagram.
type idle struct {
	mu    sync.Mutex
	timer *time.Timer // nil once stopped
}

// newIdle calls end when last, the UnixNano of the last datagram, is FlowIdle ago.
func newIdle(last *atomic.Int64, end func()) *idle {
	i := &idle{}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.timer = time.AfterFunc(FlowIdle, func() {
		left := FlowIdle - time.Since(time.Unix(0, last.Load()))
		if left <= 0 {
			end()
			return
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.timer != nil {
			i.timer.Reset(left)
		}
	})
	return i
}

func (i *idle) stop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.timer.Stop()
	i.timer = nil
}
