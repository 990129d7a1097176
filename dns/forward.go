package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

const (
	// patience is how long upstream may take, over all attempts. The C libraries give up after 5 s, and should get an
	// answer before that.
	patience = 4500 * time.Millisecond
	// step is how long an attempt is alone before the next one is made beside it.
	step = time.Second
	// penalty is how long a resolver that did not answer comes after the others.
	penalty = 30 * time.Second
)

var errNoServers = errors.New("no upstream resolver")

// forwarder asks the upstream resolvers and remembers which of them did not answer.
type forwarder struct {
	servers func() []netip.AddrPort
	dial    func(ctx context.Context, network, address string) (net.Conn, error)

	mu  sync.Mutex
	bad map[netip.AddrPort]time.Time // until when
}

func newForwarder(servers func() []netip.AddrPort, dial func(context.Context, string, string) (net.Conn, error)) *forwarder {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return &forwarder{servers: servers, dial: dial, bad: make(map[netip.AddrPort]time.Time)}
}

// attempt is one question to one server.
type attempt struct {
	server  netip.AddrPort
	via     transport
	started time.Time
}

// outcome is what became of an attempt.
type outcome struct {
	attempt
	msg []byte
	err error
}

// race is the attempts to have one question answered.
type race struct {
	f        *forwarder
	q        *query
	todo     []attempt
	running  []attempt
	answered []netip.AddrPort // by a failure of their own; asking again is of no use
	outcomes chan outcome
	wg       sync.WaitGroup
}

// exchange asks the servers and returns the first useful answer, with an ID of its own. A truncated one comes only
// where a TCP connection to the server cannot be had, and not to clients that came by TCP. The servers are asked one
// after the other as soon as one fails, and side by side when one takes long.
func (f *forwarder) exchange(ctx context.Context, q *query, t transport) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	r := &race{f: f, q: q, todo: f.plan(t)}
	r.outcomes = make(chan outcome, len(r.todo))
	defer r.wg.Wait()
	defer cancel()
	next := time.NewTimer(step)
	defer next.Stop()

	var failure []byte // SERVFAIL of a server: better than nothing
	err := errNoServers
	r.start(ctx)
	for len(r.running) > 0 {
		select {
		case <-ctx.Done():
			if failure != nil {
				return failure, nil
			}
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				f.blame(r.running)
			}
			return nil, ctx.Err()
		case <-next.C:
			if failure != nil {
				return failure, nil
			}
			r.start(ctx)
			next.Reset(step)
		case o := <-r.outcomes:
			r.running = slices.DeleteFunc(r.running, func(a attempt) bool { return a == o.attempt })
			switch {
			case o.err != nil:
				err = o.err
				f.blame([]attempt{o.attempt})
			case rcodeOf(o.msg) == miekg.RcodeServerFailure:
				failure = o.msg
				r.answered = append(r.answered, o.server)
			case t == overTCP && flags(o.msg)&flagTC != 0:
				err = errTruncated
			default:
				f.blame(r.late())
				f.forgive(o.server)
				return o.msg, nil
			}
			r.start(ctx)
			next.Reset(step)
		}
	}
	if failure != nil {
		return failure, nil
	}
	return nil, err
}

// plan lists the attempts to make, those that the client's transport suggests first: each server a second time, since
// datagrams get lost, and last by the other transport, since some paths carry only one.
func (f *forwarder) plan(t transport) []attempt {
	servers := slices.Clone(f.servers())
	now := time.Now()
	f.mu.Lock()
	for s, until := range f.bad {
		if !now.Before(until) {
			delete(f.bad, s)
		}
	}
	slices.SortStableFunc(servers, func(a, b netip.AddrPort) int { return f.rankLocked(a) - f.rankLocked(b) })
	f.mu.Unlock()
	rounds := []transport{overUDP, overUDP, overTCP}
	if t == overTCP {
		rounds = []transport{overTCP, overUDP}
	}
	var todo []attempt
	for _, via := range rounds {
		for _, s := range servers {
			todo = append(todo, attempt{server: s, via: via})
		}
	}
	return todo
}

func (f *forwarder) rankLocked(s netip.AddrPort) int {
	if _, bad := f.bad[s]; bad {
		return 1
	}
	return 0
}

// blame remembers that these attempts were in vain.
func (f *forwarder) blame(attempts []attempt) {
	until := time.Now().Add(penalty)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range attempts {
		f.bad[a.server] = until
	}
}

func (f *forwarder) forgive(s netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.bad, s)
}

// start makes the next attempt, if there is one left.
func (r *race) start(ctx context.Context) {
	for len(r.todo) > 0 {
		a := r.todo[0]
		r.todo = r.todo[1:]
		if slices.Contains(r.answered, a.server) {
			continue
		}
		a.started = time.Now()
		r.running = append(r.running, a)
		r.wg.Go(func() {
			msg, err := r.f.ask(ctx, a, r.q)
			r.outcomes <- outcome{a, msg, err}
		})
		return
	}
}

// late returns the attempts that had all the time they needed.
func (r *race) late() []attempt {
	var late []attempt
	for _, a := range r.running {
		if time.Since(a.started) >= step {
			late = append(late, a)
		}
	}
	return late
}
