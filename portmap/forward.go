package portmap

import (
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/splice"
	"github.com/usernet/usernet/internal/undo"
)

// Forward is one published port. It lives until Close.
type Forward struct {
	port     usernet.Port
	counters *counters
	server   *server
	request  Request
	served   splice.Group
	streams  streams

	mu   sync.Mutex // held over a whole Close, so that a second one waits for the first
	undo undo.List
}

// Stats counts what a Forward did. Clients are TCP connections and UDP flows.
type Stats struct {
	Accepted uint64 // clients since Publish, without the refused ones
	Active   int    // clients now
	Refused  uint64 // clients turned away: the container did not answer, or there were too many
}

type counters struct {
	accepted, refused atomic.Uint64
	active            atomic.Int64
}

// Port is what was published, with the host port that was chosen; HostPortEnd equals HostPort.
func (f *Forward) Port() usernet.Port { return f.port }

// Stats returns the counters as they are now. For SCTP they stay 0.
func (f *Forward) Stats() Stats {
	return Stats{
		Accepted: f.counters.accepted.Load(),
		Active:   int(f.counters.active.Load()),
		Refused:  f.counters.refused.Load(),
	}
}

// Close stops listening, ends what is being relayed, waits until all of it has gone and frees the port. A peer of a
// connection that this cut short gets a reset, not an end of stream. Close may be called again.
func (f *Forward) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.undo.Close()
}

// server is what the listeners of one forward share.
type server struct {
	dialer   Dialer
	limits   limits
	log      *slog.Logger
	counters *counters
	batches  *sync.Pool
}

// start serves the claim's sockets until the Forward is closed.
func (m *Mapper) start(req Request, c *claim) *Forward {
	f := &Forward{port: req.Port, counters: new(counters), request: req, undo: c.undo}
	f.port.HostPort, f.port.HostPortEnd = c.port, c.port

	r := &server{
		dialer:   req.Dialer,
		limits:   m.limits,
		log:      m.log.With("port", f.port.String(), "owner", req.Owner),
		counters: f.counters,
		batches:  &m.batches,
	}
	f.server = r
	for _, ln := range c.tcp {
		r.serveTCP(&f.served, ln.fd, req.targets(ln.at))
	}
	var udp []*udpListener
	for _, ln := range c.udp {
		udp = append(udp, &udpListener{fd: ln.fd, anywhere: ln.at.IsUnspecified(), target: req.targets(ln.at)[0]})
	}
	r.serveUDP(&f.served, udp)
	f.undo.Push(func() error {
		f.streams.close()
		f.served.Close()
		return nil
	})
	return f
}
