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
			r.refuse(spliced(client), from, errTooMany)
			return
		}
		r.serveClient(g, spliced(client), from, targets)
	})
}

// client is the outer end of a connection that is being made.
type client interface {
	join(g *splice.Group, container int, done func()) // with the inner one; done is called when both have ended
	refuse()
}

// spliced is a client by a socket, which splice can join with another one.
type spliced int

func (c spliced) join(g *splice.Group, container int, done func()) { g.Join(int(c), container, done) }
func (c spliced) refuse()                                          { splice.Refuse(int(c)) }

// serveClient relays one connection, or refuses it at once. A container that listens for one address family only, as
// many do, is found at its other address.
func (r *server) serveClient(g *splice.Group, client client, from netip.AddrPort, targets []netip.AddrPort) {
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
		client.join(g, container, func() { r.counters.active.Add(-1) })
	})
}

func (r *server) refuse(client client, from netip.AddrPort, err error) {
	r.counters.refused.Add(1)
	r.counters.active.Add(-1)
	client.refuse()
	r.log.Debug("refused a connection", "client", from, "err", err)
}
