package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// idle is how long a connection stays open without a question (RFC 7766 section 6.2.3), and how long a client may
	// take to send a message or to receive one.
	idle = 10 * time.Second

	maxConns       = 256
	maxConnsClient = 16

	// outboxFull is how many bytes may wait for a client that is slow to receive them.
	outboxFull = 256 << 10
)

// serveTCP answers on connections until ctx is done. A client that has too many of them is turned away.
func (s *server) serveTCP(ctx context.Context, ln net.Listener) error {
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	conns := connCount{clients: make(map[netip.Addr]int)}
	var p pause
	for {
		c, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept: %w", err)
		case err != nil:
			if p.begins() {
				s.r.log.Warn("cannot accept connections for a while", "err", err)
			}
			p.wait(ctx)
			continue
		}
		p.reset()
		client := addrPort(c.RemoteAddr()).Addr()
		if !conns.add(client) {
			c.Close()
			continue
		}
		s.wg.Go(func() {
			defer conns.remove(client)
			s.serveConn(ctx, c, client)
		})
	}
}

// connCount counts the open connections.
type connCount struct {
	mu      sync.Mutex
	all     int
	clients map[netip.Addr]int
}

func (n *connCount) add(client netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.all >= maxConns || n.clients[client] >= maxConnsClient {
		return false
	}
	n.all++
	n.clients[client]++
	return true
}

func (n *connCount) remove(client netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all--
	if n.clients[client]--; n.clients[client] == 0 {
		delete(n.clients, client)
	}
}

// serveConn answers on one connection. The answers leave as they are ready, in whatever order (RFC 7766 section 7).
// A client that has closed its side still gets those that it waits for.
func (s *server) serveConn(ctx context.Context, c net.Conn, client netip.Addr) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	box := newOutbox(c)
	var writer sync.WaitGroup
	writer.Go(box.write)
	defer writer.Wait()
	defer box.close()

	var pending pending
	defer pending.Wait()
	in := bufio.NewReader(c)
	var q query
	var msg, out []byte
	for {
		var err error
		if msg, err = readMessage(c, in, msg[:0], &pending); err != nil {
			return
		}
		reply, via := s.r.answer(&q, out[:0], msg, peer{client, overTCP})
		switch {
		case via != nil:
			pending.add()
			deliver := func(reply []byte) {
				box.put(reply)
				pending.done()
			}
			s.forward(ctx, via, waiter{q.clone(), client, q.limit(overTCP), deliver}, overTCP)
		case reply == nil: // not a question: there is no telling what follows
			return
		case !box.putWhenRoom(reply):
			return
		default:
			out = reply
		}
	}
}

// readMessage reads a message into b, which is empty, or a longer one. A connection is not idle while its client waits for answers.
func readMessage(c net.Conn, in *bufio.Reader, b []byte, p *pending) ([]byte, error) {
	for {
		c.SetReadDeadline(time.Now().Add(idle))
		if _, err := in.Peek(1); err == nil {
			break
		} else if !isTimeout(err) || p.n.Load() == 0 {
			return nil, err
		}
	}
	var size [2]byte
	if _, err := io.ReadFull(in, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	b = slices.Grow(b, n)[:n]
	_, err := io.ReadFull(in, b)
	return b, err
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// pending is a WaitGroup that tells how many it waits for.
type pending struct {
	sync.WaitGroup
	n atomic.Int32
}

func (p *pending) add()  { p.n.Add(1); p.Add(1) }
func (p *pending) done() { p.n.Add(-1); p.Done() }

// outbox is what waits to be written to a connection. An exchange with upstream may have many clients, and none of
// them may hold up the others.
type outbox struct {
	conn net.Conn

	mu     sync.Mutex
	change sync.Cond
	buf    []byte
	closed bool // nothing more comes, or nothing more can be written
}

func newOutbox(c net.Conn) *outbox {
	b := &outbox{conn: c}
	b.change.L = &b.mu
	return b
}

// put adds a message. A client that does not receive what it asked for loses its connection.
func (b *outbox) put(msg []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.buf) >= outboxFull {
		b.conn.Close()
		return
	}
	b.addLocked(msg)
}

// putWhenRoom adds a message when there is room for it, and returns false if that will not be.
func (b *outbox) putWhenRoom(msg []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.buf) >= outboxFull && !b.closed {
		b.change.Wait()
	}
	b.addLocked(msg)
	return !b.closed
}

func (b *outbox) addLocked(msg []byte) {
	if !b.closed {
		b.buf = binary.BigEndian.AppendUint16(b.buf, uint16(len(msg)))
		b.buf = append(b.buf, msg...)
		b.change.Broadcast()
	}
}

func (b *outbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.change.Broadcast()
}

// write writes what is put until the outbox is closed and empty, or the client does not receive it.
func (b *outbox) write() {
	var buf []byte
	for {
		b.mu.Lock()
		for len(b.buf) == 0 && !b.closed {
			b.change.Wait()
		}
		buf, b.buf = b.buf, buf[:0]
		b.change.Broadcast()
		b.mu.Unlock()
		if len(buf) == 0 {
			return
		}
		b.conn.SetWriteDeadline(time.Now().Add(idle))
		if _, err := b.conn.Write(buf); err != nil {
			b.conn.Close() // ends the reader too
			b.close()
			return
		}
	}
}
