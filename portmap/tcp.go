package portmap

import (
	"context"
	"net"
	"net/netip"

	"github.com/usernet/usernet/internal/splice"
)

// serveTCP relays every client of ln to target. It returns when ctx has ended and the last client has gone.
func (r *server) serveTCP(ctx context.Context, ln *net.TCPListener, target netip.AddrPort) {
	splice.Accept(ctx, ln, r.log, func(client *net.TCPConn) { r.serveClient(ctx, client, target) })
}

// serveClient relays one connection, or refuses it at once.
func (r *server) serveClient(ctx context.Context, client *net.TCPConn, target netip.AddrPort) {
	defer r.counters.active.Add(-1)
	if r.counters.active.Add(1) > int64(r.limits.conns) {
		r.counters.refused.Add(1)
		splice.Refuse(client)
		return
	}
	from := addrPort(client.RemoteAddr())
	dialing, cancel := context.WithTimeout(ctx, r.limits.dial)
	container, err := r.dialer.DialTCP(dialing, from, target)
	cancel()
	if err != nil {
		r.counters.refused.Add(1)
		splice.Refuse(client)
		r.log.Debug("refused a connection", "client", from, "err", err)
		return
	}
	defer client.Close()
	defer container.Close()
	r.counters.accepted.Add(1)
	splice.Join(ctx, client, container)
}
