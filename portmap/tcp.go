package portmap

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

var errTooMany = errors.New("too many connections")

// serveTCP relays every client of the listening socket fd to the first of targets that takes it, until the group is
// closed.
func (r *server) serveTCP(g *splice.Group, fd int, targets []netip.AddrPort) {
	g.Serve(fd, r.log, func(client int, from netip.AddrPort) {
		if r.counters.active.Add(1) > int64(r.limits.conns) {
			r.refuse(client, from, errTooMany)
			return
		}
		r.serveClient(g, client, from, targets)
	})
}

// serveClient relays one connection, or refuses it at once. A container that listens for one address family only, as
// many do, is found at its other address.
func (r *server) serveClient(g *splice.Group, client int, from netip.AddrPort, targets []netip.AddrPort) {
	failed := func(err error) {
		if errors.Is(err, unix.ECONNREFUSED) && len(targets) > 1 {
			r.serveClient(g, client, from, targets[1:])
			return
		}
		r.refuse(client, from, err)
	}
	container, err := r.dialer.StartTCP(from, targets[0])
	if err != nil {
		failed(err)
		return
	}
	g.Connect(container, r.limits.dial, func(err error) {
		if err != nil {
			unix.Close(container)
			failed(err)
			return
		}
		r.counters.accepted.Add(1)
		g.Join(client, container, func() { r.counters.active.Add(-1) })
	})
}

func (r *server) refuse(client int, from netip.AddrPort, err error) {
	r.counters.refused.Add(1)
	r.counters.active.Add(-1)
	splice.Refuse(client)
	r.log.Debug("refused a connection", "client", from, "err", err)
}
