package publish

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock/proxy"
)

// session is one guest at the host.
type session struct {
	server *Server
	number string // the guest's own
	guest  string // for people
	secret string
	pool   pool
	conns  atomic.Int64 // connections and flows of all ports

	ctx   context.Context // done when the session is to end
	stop  context.CancelFunc
	ended chan struct{} // closed when nothing is left of it

	ports map[key]*hostPort // of the session's own goroutine
}

func newSession(s *Server, number, guest string) *session {
	x := &session{server: s, number: number, guest: guest, secret: newNumber(), ended: make(chan struct{}), ports: make(map[key]*hostPort)}
	x.ctx, x.stop = context.WithCancel(context.Background())
	return x
}

// run answers the guest until one of the two ends it, and tells why it ended.
func (x *session) run(l *lines) error {
	defer l.conn.Close()
	var pings sync.WaitGroup
	defer pings.Wait()
	defer x.stop()
	defer context.AfterFunc(x.ctx, func() { l.conn.Close() })()
	pings.Go(func() { l.ping(x.ctx) })
	for {
		m, err := l.read()
		if x.ctx.Err() != nil {
			return ErrClosed
		}
		if err != nil {
			return err
		}
		if m.ID == 0 {
			continue // a ping, or nothing that we know
		}
		if err := l.write(x.answer(m)); err != nil {
			return err
		}
	}
}

// answer does what the guest asks for.
func (x *session) answer(q message) message {
	a := message{ID: q.ID}
	port, err := q.Port, error(nil)
	switch q.Op {
	case opPublish:
		port, err = x.publish(q)
	case opUnpublish:
		x.unpublish(key{q.Proto, q.Addr.Unmap(), q.Port})
	default:
		err = fmt.Errorf("%w: operation %.32q", usernet.ErrInvalid, q.Op)
	}
	if len(x.ports) == 0 {
		x.pool.clear()
	}
	if err != nil {
		a.Error, a.Taken = err.Error(), errors.Is(err, usernet.ErrPortTaken)
		return a
	}
	a.Port = port
	return a
}

func (x *session) publish(q message) (uint16, error) {
	q.Addr = q.Addr.Unmap()
	if q.Proto != usernet.TCP && q.Proto != usernet.UDP {
		return 0, fmt.Errorf("%w: protocol %.16q", usernet.ErrInvalid, q.Proto)
	}
	if q.End != 0 && q.End < max(q.Port, 1) {
		return 0, fmt.Errorf("%w: the range %d-%d", usernet.ErrInvalid, q.Port, q.End)
	}
	if q.Addr.IsMulticast() {
		return 0, fmt.Errorf("%w: %s is a multicast address", usernet.ErrInvalid, q.Addr)
	}
	if most := x.server.cfg.Limits.Ports; len(x.ports) >= most {
		return 0, fmt.Errorf("%d ports are the most that the gateway opens for a guest", most)
	}
	opened, err := x.server.openFirst(q)
	if err != nil {
		return 0, err
	}
	p := newHostPort(x, q, opened)
	x.ports[key{p.proto, p.addr, p.port}] = p
	x.server.add(p)
	p.start()
	x.server.cfg.Log.Debug("published", "guest", x.guest, "port", key{p.proto, p.addr, p.port}.String())
	return p.port, nil
}

func (x *session) unpublish(k key) {
	if p := x.ports[k]; p != nil {
		delete(x.ports, k)
		p.close()
		x.server.remove(p)
	}
}

// close takes away what the session has, once it runs no more.
func (x *session) close() {
	x.pool.close()
	var closing sync.WaitGroup
	for _, p := range x.ports {
		closing.Go(p.close)
	}
	closing.Wait()
	for _, p := range x.ports {
		x.server.remove(p)
	}
}

// headerWithin is how long a standing stream may take for a header. It is free to take it at once.
const headerWithin = 5 * time.Second

// open finds a stream for a connection and says on it whose it is.
func (x *session) open(done <-chan struct{}, h proxy.Header) (stream, error) {
	for deadline := time.Now().Add(maxWait); ; {
		s, err := x.pool.take(done, deadline)
		if err != nil {
			return stream{}, err
		}
		if err := begin(s.conn, h); err == nil {
			return s, nil
		}
		s.conn.Close() // the guest has let go of it
	}
}

func begin(conn net.Conn, h proxy.Header) error {
	if err := conn.SetWriteDeadline(time.Now().Add(headerWithin)); err != nil {
		return err
	}
	if err := h.Write(conn); err != nil {
		return err
	}
	return conn.SetWriteDeadline(time.Time{})
}
