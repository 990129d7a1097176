package portmap

import (
	"errors"
	"net/netip"

	"github.com/usernet/usernet/internal/splice"
)

var errTooMany = errors.New("too many connections")

// serveTCP relays every client of the listening socket fd to target, until the group is closed.
func (r *server) serveTCP(g *splice.Group, fd int, target netip.AddrPort) {
	g.Serve(fd, r.log, func(client int, from netip.AddrPort) { r.serveClient(g, client, from, target) })
}

// serveClient relays one connection, or refuses it at once.
func (r *server) serveClient(g *splice.Group, client int, from, target netip.AddrPort) {
	refuse := func(err error) {
		r.counters.refused.Add(1)
		r.counters.active.Add(-1)
		splice.Refuse(client)
		r.log.Debug("refused a connection", "client", from, "err", err)
	}
	if r.counters.active.Add(1) > int64(r.limits.conns) {
		refuse(errTooMany)
		return
	}
	container, err := r.dialer.StartTCP(from, target)
	if err != nil {
		refuse(err)
		return
	}
	g.Connect(container, r.limits.dial, func(err error) {
		if err != nil {
			splice.Refuse(container)
			refuse(err)
			return
		}
		r.counters.accepted.Add(1)
		g.Join(client, container, func() { r.counters.active.Add(-1) })
	})
}
