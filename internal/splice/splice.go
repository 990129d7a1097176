// Package splice accepts TCP connections and joins each with another one, in the kernel as far as it goes. It does not
// know where connections lead; whoever serves them dials.
package splice

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// past is a deadline that ends every blocked read and write.
var past = time.Unix(1, 0)

// Accept calls serve, in a goroutine of its own, for every client of ln until ctx is done. It returns when the last
// call has. It does not close ln; serve closes its connection.
func Accept(ctx context.Context, ln *net.TCPListener, log *slog.Logger, serve func(*net.TCPConn)) {
	defer context.AfterFunc(ctx, func() { ln.SetDeadline(past) })()
	var clients sync.WaitGroup
	defer clients.Wait()
	var p Pause
	for {
		client, err := ln.AcceptTCP()
		switch {
		case err == nil:
			p.Reset()
			clients.Go(func() { serve(client) })
		case ctx.Err() != nil:
			return
		default:
			if p.First() {
				log.Warn("cannot accept connections for a while", "err", err)
			}
			p.Wait(ctx)
		}
	}
}

// Refuse ends a connection that nobody serves with a reset. One that was kept would cost a descriptor for as long as
// the client likes.
func Refuse(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// side is one end of a relayed connection.
type side struct {
	conn *net.TCPConn
	shut atomic.Bool // the end of the stream was, or is about to be, passed to it
}

// Join copies both ways until both directions have ended or ctx has. A side that was sent less than the other side
// had for it is set to be reset when it is closed, so that it cannot take the cut for the end. The caller closes both.
func Join(ctx context.Context, client, server *net.TCPConn) {
	c, s := &side{conn: client}, &side{conn: server}
	expire := func() {
		client.SetDeadline(past)
		server.SetDeadline(past)
	}
	defer context.AfterFunc(ctx, expire)()
	var up error
	var wg sync.WaitGroup
	wg.Go(func() { up = pump(s, c, expire) })
	down := pump(c, s, expire)
	wg.Wait()
	if up != nil {
		server.SetLinger(0)
	}
	if down != nil {
		client.SetLinger(0)
	}
}

// pump copies src to dst and passes the end of the stream on.
//
// On an error it calls expire to end the opposite pump too, unless dst is gone: then that one ends by itself, after
// it has delivered what dst said before.
func pump(dst, src *side, expire func()) error {
	err := move(dst.conn, src.conn)
	if err == nil && !src.shut.Load() && gone(src.conn) {
		// The kernel reports a reset once. The opposite pump got it, and this one saw what looks like an end.
		err = unix.ECONNRESET
	}
	if err == nil {
		dst.shut.Store(true)
		err = dst.conn.CloseWrite()
	}
	if err != nil && !gone(dst.conn) {
		expire()
	}
	return err
}

// tcpClose is TCP_CLOSE of the kernel's include/net/tcp_states.h: reset by the peer, or timed out.
const tcpClose = 7

// gone reports whether the connection does not exist any more, although our socket does.
func gone(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	state := uint8(0)
	raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	})
	return state == tcpClose
}

// Pause is the wait after a failed accept or read: a lack of descriptors or memory passes, and trying at once again
// would only add to it. The zero value is ready for use.
type Pause struct{ next time.Duration }

const shortestPause, longestPause = 5 * time.Millisecond, time.Second

// First reports whether there was no failure before this one.
func (p *Pause) First() bool { return p.next == 0 }

// Reset is called after a success.
func (p *Pause) Reset() { p.next = 0 }

// Wait sleeps, each time twice as long, or until ctx ends.
func (p *Pause) Wait(ctx context.Context) {
	p.next = min(max(2*p.next, shortestPause), longestPause)
	t := time.NewTimer(p.next)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
