package portmap

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// serveTCP relays every client of ln to target. It returns when ctx has ended and the last client has gone.
func (r *relay) serveTCP(ctx context.Context, ln *net.TCPListener, target netip.AddrPort) {
	defer context.AfterFunc(ctx, func() { ln.SetDeadline(past) })()
	var clients sync.WaitGroup
	defer clients.Wait()
	var p pause
	for {
		client, err := ln.AcceptTCP()
		switch {
		case err == nil:
			p.reset()
			clients.Go(func() { r.serveClient(ctx, client, target) })
		case ctx.Err() != nil:
			return
		default:
			if p.first() {
				r.log.Warn("cannot accept connections for a while", "err", err)
			}
			p.wait(ctx)
		}
	}
}

// serveClient relays one connection. A client that cannot be served is reset at once: one that is kept without a
// container behind it costs a descriptor for as long as it likes.
func (r *relay) serveClient(ctx context.Context, client *net.TCPConn, target netip.AddrPort) {
	defer client.Close()
	defer r.counters.active.Add(-1)
	if r.counters.active.Add(1) > int64(r.limits.conns) {
		r.counters.refused.Add(1)
		client.SetLinger(0)
		return
	}
	from := addrPort(client.RemoteAddr())
	dialing, cancel := context.WithTimeout(ctx, r.limits.dial)
	server, err := r.dialer.DialTCP(dialing, from, target)
	cancel()
	if err != nil {
		r.counters.refused.Add(1)
		client.SetLinger(0)
		r.log.Debug("refused a connection", "client", from, "err", err)
		return
	}
	defer server.Close()
	r.counters.accepted.Add(1)
	join(ctx, client, server)
}

// side is one end of a relayed connection.
type side struct {
	conn *net.TCPConn
	shut atomic.Bool // the end of the stream was, or is about to be, passed to it
}

// join copies both ways until both directions have ended or ctx has. A side that was sent less than the other side
// had for it is set to be reset when it is closed, so that it cannot take the cut for the end.
func join(ctx context.Context, client, server *net.TCPConn) {
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

// pump copies src to dst and passes the end of the stream on. Both must be bare TCP connections: io.Copy then moves
// the bytes with splice(2), and any wrapper would stop that.
//
// On an error it calls expire to end the opposite pump too, unless dst is gone: then that one ends by itself, after
// it has delivered what dst said before.
func pump(dst, src *side, expire func()) error {
	_, err := io.Copy(dst.conn, src.conn)
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
