package portmap

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

// datagrams is the UDP side of a forward: the listening sockets, and a flow for each client. One thread serves all of
// them, so nothing here needs a lock.
type datagrams struct {
	*server
	listeners []*udpListener
	flows     *flowTable
	watcher   *splice.Watcher
	wakeAt    time.Time // zero: nothing is due
}

// udpListener is a socket that clients send to.
type udpListener struct {
	fd       int
	anywhere bool // it is bound to a wildcard, and asked for destinations
	target   netip.AddrPort
	watch    *splice.Watch // nil while it is not read
	pause    splice.Pause
}

// serveUDP relays what arrives at the listeners to their targets, until the group is closed.
func (r *server) serveUDP(g *splice.Group, listeners []*udpListener) {
	if len(listeners) == 0 {
		return
	}
	s := &datagrams{server: r, listeners: listeners, flows: newFlowTable(r.limits)}
	g.Watch(func(w *splice.Watcher) {
		s.watcher = w
		s.wake()
	}, s.end)
}

// wake does what is due: listeners that are not read are tried again, and flows that have been idle for too long end.
func (s *datagrams) wake() {
	s.wakeAt = time.Time{}
	for _, l := range s.listeners {
		if l.watch == nil {
			s.listen(l)
		}
	}
	now := s.flows.now()
	for f := s.flows.expired(now); f != nil; f = s.flows.expired(now) {
		s.endFlow(f)
	}
	if f := s.flows.idlest(); f != nil {
		s.wakeIn(s.flows.left(f, now))
	}
}

// wakeIn sees to it that wake is called when d has passed, or earlier.
func (s *datagrams) wakeIn(d time.Duration) {
	at := time.Now().Add(d)
	if s.wakeAt.IsZero() || at.Before(s.wakeAt) {
		s.wakeAt = at
		s.watcher.Alarm(d, s.wake)
	}
}

func (s *datagrams) listen(l *udpListener) {
	watch, err := s.watcher.Add(l.fd, func() { s.receive(l) })
	if err != nil {
		s.rest(l, err)
		return
	}
	l.watch = watch
}

// rest leaves l alone for a while.
func (s *datagrams) rest(l *udpListener, err error) {
	if l.pause.First() {
		s.log.Warn("cannot read datagrams for a while", "err", err)
	}
	if l.watch != nil {
		s.watcher.Remove(l.watch)
		l.watch = nil
	}
	s.wakeIn(l.pause.Next())
}

// end is called when the forward is closed.
func (s *datagrams) end() {
	for _, l := range s.listeners {
		if l.watch != nil {
			s.watcher.Remove(l.watch)
		}
	}
	for f := s.flows.idlest(); f != nil; f = s.flows.idlest() {
		s.endFlow(f)
	}
}

// receive carries datagrams of clients to the container.
func (s *datagrams) receive(l *udpListener) {
	b := s.batches.Get().(*batch)
	defer s.batches.Put(b)
	n, err := b.in.receive(l.fd)
	if err != nil {
		if err != unix.EAGAIN {
			s.rest(l, err)
		}
		return
	}
	l.pause.Reset()
	now := s.flows.now()
	var f *flow
	for i := range n {
		if f == nil || !b.in.alike(i) {
			b.out.flush()
			if f = s.flowOf(l, &b.in, i, now); f == nil {
				continue
			}
			b.out.open(&f.in)
		}
		b.out.add(b.in.message(i))
	}
	b.out.flush()
}

// flowOf is the flow that the i-th message in the inbox belongs to, a new one if need be. It is nil if there is none to be
// had, or the message was not for this host alone.
func (s *datagrams) flowOf(l *udpListener, in *inbox, i int, now int64) *flow {
	var key flowKey
	key.client, key.scope = in.client(i)
	if l.anywhere {
		var unicast bool
		if key.local, unicast = parseDestination(in.control(i)); !unicast {
			return nil
		}
	}
	if f := s.flows.use(key, now); f != nil {
		return f
	}
	f, err := s.newFlow(key, l, in.name(i))
	if err != nil {
		s.counters.refused.Add(1)
		s.log.Debug("refused a flow", "client", key.source(), "err", err)
		return nil
	}
	if evicted := s.flows.add(f, now); evicted != nil {
		s.endFlow(evicted)
	}
	s.wakeIn(s.flows.idle)
	return f
}

// answer carries datagrams of the container to the flow's client.
func (s *datagrams) answer(f *flow) {
	b := s.batches.Get().(*batch)
	defer s.batches.Put(b)
	n, err := b.in.receive(f.in.fd)
	if err != nil {
		if err != unix.EAGAIN && !isICMP(err) {
			s.endFlow(f)
		}
		return
	}
	s.flows.touch(f, s.flows.now())
	b.out.open(&f.out)
	for i := range n {
		b.out.add(b.in.message(i))
	}
	b.out.flush()
}
