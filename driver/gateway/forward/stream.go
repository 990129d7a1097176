package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"
)

// join relays an accepted connection until both directions have ended, and owns it. An error says that the target could not
// be reached.
type join func(ctx context.Context, host net.Conn, client netip.AddrPort) error

// accept takes connections until the listener is closed, and has each joined by a goroutine of its own, so that a target that
// does not answer holds up nobody else.
func (f *Forward) accept(ctx context.Context, l net.Listener, join join) {
	var p pause
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed) || ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return
		case err != nil:
			// No descriptor is left, most likely (EMFILE): the client stays in the backlog.
			if p.wait(ctx) {
				f.log.Warn("cannot accept connections for a while", "err", err)
			}
			continue
		}
		p.reset()
		if f.counters.active.Load() >= int64(f.limits.conns) {
			f.counters.refused.Add(1)
			reset(conn)
			continue
		}
		f.counters.accepted.Add(1)
		f.counters.active.Add(1)
		f.wg.Go(func() {
			defer f.counters.active.Add(-1)
			client := addrPort(conn.RemoteAddr())
			if err := join(ctx, conn, client); err != nil && ctx.Err() == nil {
				f.counters.failed.Add(1)
				f.log.Debug("connection failed", "client", client, "err", err)
			}
		})
	}
}

// addrPort is the address of a TCP or UDP socket, zero for others.
func addrPort(a net.Addr) netip.AddrPort {
	ap, ok := a.(interface{ AddrPort() netip.AddrPort })
	if !ok {
		return netip.AddrPort{}
	}
	return plain(ap.AddrPort())
}

// plain is an address of a socket for both families as others know it.
func plain(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// reset closes a connection so that the other end is told of it as an error, where the kind of connection has a way to say so.
func reset(conn net.Conn) error {
	if c, ok := conn.(interface{ SetLinger(int) error }); ok {
		c.SetLinger(0)
	}
	return conn.Close()
}

// pause is how long to leave something alone that fails again and again.
type pause struct {
	failed int
}

// The shortest and the longest pause.
const (
	firstPause = 5 * time.Millisecond
	longPause  = time.Second
)

// wait waits until the next try, or until ctx is done. It returns true for the first failure in a row.
func (p *pause) wait(ctx context.Context) (first bool) {
	d := min(firstPause<<min(p.failed, 10), longPause)
	p.failed++
	sleep(ctx, d)
	return p.failed == 1
}

func (p *pause) reset() { p.failed = 0 }

// sleep waits for d to pass or ctx to end.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
