package dns

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
)

// Limits on questions that wait for upstream: each exchange has one or two sockets.
const (
	maxWaiting       = 1024
	maxWaitingClient = 256
)

// Serve answers what comes to the two sockets, either of which may be nil, until ctx is done; then it returns nil. It
// closes them when it returns. It may be called for several pairs of sockets at once.
func (r *Resolver) Serve(ctx context.Context, udp net.PacketConn, tcp net.Listener) error {
	s := &server{r: r, open: make(map[flightKey]*flight), clients: make(map[netip.Addr]int)}
	g, ctx := errgroup.WithContext(ctx)
	defer s.wg.Wait()
	if udp != nil {
		g.Go(func() error { return s.serveUDP(ctx, udp) })
	}
	if tcp != nil {
		g.Go(func() error { return s.serveTCP(ctx, tcp) })
	}
	return g.Wait()
}

// server is one call of Serve: the questions of its clients that wait for upstream.
type server struct {
	r  *Resolver
	wg sync.WaitGroup // exchanges and TCP connections

	mu      sync.Mutex
	open    map[flightKey]*flight
	waiting int
	clients map[netip.Addr]int // how many of the waiting ones are whose
}

// flightKey is what makes the answers to two questions the same.
type flightKey struct {
	via      *Resolver
	question string // see query.appendKey; "" stands for itself alone
	t        transport
}

// flight is one exchange with upstream and those who wait for it.
type flight struct {
	q       *query // the first one's
	waiters []waiter
}

// waiter is a client's question. Its deliver must not block.
type waiter struct {
	q       *query
	client  netip.Addr
	limit   int
	deliver func(reply []byte)
}

// forward asks via's upstream on behalf of w; if the same question is being asked already, its answer is w's too.
func (s *server) forward(ctx context.Context, via *Resolver, w waiter, t transport) {
	key := flightKey{via: via, t: t}
	if w.q.plain {
		var space [keySpace]byte
		key.question = string(w.q.appendKey(space[:0]))
	}
	f, leads := s.join(key, w)
	switch {
	case f == nil:
		w.deliver(w.q.appendError(nil, miekg.RcodeServerFailure))
	case leads:
		s.wg.Go(func() { s.fly(ctx, f, key) })
	}
}

// join counts w as waiting and returns its flight and whether that is a new one; nil if too many are waiting.
func (s *server) join(key flightKey, w waiter) (f *flight, leads bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting >= maxWaiting || s.clients[w.client] >= maxWaitingClient {
		return nil, false
	}
	s.waiting++
	s.clients[w.client]++
	if w.q.plain {
		f = s.open[key]
	}
	if f == nil {
		f, leads = &flight{q: w.q}, true
		if w.q.plain {
			s.open[key] = f
		}
	}
	f.waiters = append(f.waiters, w)
	return f, leads
}

// leave ends a flight and returns those who waited for it.
func (s *server) leave(key flightKey, f *flight) []waiter {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[key] == f {
		delete(s.open, key)
	}
	for _, w := range f.waiters {
		s.waiting--
		if s.clients[w.client]--; s.clients[w.client] == 0 {
			delete(s.clients, w.client)
		}
	}
	return f.waiters
}

// fly makes the exchange that f is about and gives everybody the answer.
func (s *server) fly(ctx context.Context, f *flight, key flightKey) {
	start := time.Now()
	msg, err := key.via.upstream.exchange(ctx, f.q, key.t)
	if err != nil && ctx.Err() == nil {
		s.r.log.Debug("no answer from upstream", "name", f.q.name, "type", miekg.Type(f.q.qtype),
			"after", time.Since(start), "err", err)
	}
	if err == nil && key.question != "" {
		key.via.cache.put(key.question, msg)
	}
	for _, w := range s.leave(key, f) {
		if err != nil {
			w.deliver(w.q.appendError(nil, miekg.RcodeServerFailure))
			continue
		}
		w.deliver(w.q.adopt(append([]byte(nil), msg...), w.limit))
	}
}
