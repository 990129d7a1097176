// Package dns is the resolver of one network: it answers the names of the network itself and passes every other
// question on to the host's resolvers. It listens on sockets that it is given and dials with a function that it is
// given, so that it may stand with one foot in each of two network namespaces. It validates no signatures and serves
// no zone transfers.
package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"

	miekg "github.com/miekg/dns"
)

// Source knows the names of some part of the world. It must be safe for concurrent use.
type Source interface {
	// Lookup tells what there is under name, which is lower case, in presentation format (RFC 1035 section 5.1), and
	// ends with a dot. False means that the name is not for this source to answer.
	Lookup(name string) (Answer, bool)
}

// Answer is what a Source knows of one name. A name that exists and has neither addresses nor names is answered
// without data. The slices belong to the source.
type Answer struct {
	Missing bool         // the name does not exist: NXDOMAIN
	Addrs   []netip.Addr // for A and AAAA; several are given in an order that changes
	Names   []string     // for PTR; fully qualified
	Zone    string       // the zone that a negative answer speaks for; "" means the name itself
}

// Config is what a Resolver needs.
type Config struct {
	// Sources are asked in order; the first that is responsible answers. The special names of RFC 6761 come before.
	Sources []Source
	// Servers returns the upstream resolvers, the preferred one first; it is called for every question. Nil means a
	// network without a way out: what the sources do not know does not exist.
	Servers func() []netip.AddrPort
	// KeepUnqualified tells that addresses of names with a single label are not asked for upstream: what the sources do
	// not know of them does not exist, as with Podman's own resolver. Docker's passes them on.
	KeepUnqualified bool
	// Client tells whether a client is answered, and the resolvers of the other networks that it is on: it may know the names
	// there as well, and where this network has no way out, the first of theirs is taken. It is called for every question.
	// Nil: everybody is answered, and is on this network alone.
	Client func(client netip.Addr) (others []*Resolver, ok bool)
	// Dial makes a connection ("udp" or "tcp") to an upstream resolver. Nil means net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	Log  *slog.Logger
}

// Resolver answers the questions of one network. Its methods may be called concurrently.
type Resolver struct {
	sources  []Source
	upstream *forwarder // nil: none
	client   func(netip.Addr) ([]*Resolver, bool)
	bare     bool // Config.KeepUnqualified
	cache    *cache
	log      *slog.Logger
}

// New makes a resolver. It does nothing until Serve is called.
func New(c Config) *Resolver {
	r := &Resolver{
		sources: append([]Source{special{}}, c.Sources...),
		client:  c.Client,
		bare:    c.KeepUnqualified,
		cache:   newCache(),
		log:     c.Log,
	}
	if c.Servers != nil {
		r.upstream = newForwarder(c.Servers, c.Dial)
	}
	return r
}

// peer is who asks, and how.
type peer struct {
	addr netip.Addr
	by   transport
}

// answer reads one message into q. It returns the reply, appended to out, which is nil where none is due, or the
// resolver whose upstream has to be asked.
func (r *Resolver) answer(q *query, out, msg []byte, from peer) (reply []byte, via *Resolver) {
	switch rcode, ok := q.parse(msg); {
	case !ok:
		return nil, nil
	case rcode != miekg.RcodeSuccess:
		return q.appendError(out, rcode), nil
	case q.qtype == miekg.TypeAXFR || q.qtype == miekg.TypeIXFR:
		return q.appendError(out, miekg.RcodeRefused), nil
	}
	var others []*Resolver
	if r.client != nil {
		var ok bool
		if others, ok = r.client(from.addr); !ok {
			return q.appendError(out, miekg.RcodeRefused), nil
		}
	}
	limit := q.limit(from.by)
	if q.qclass == miekg.ClassINET {
		if a, ok := r.lookup(q.name, others); ok {
			return truncate(q.appendAnswer(out, a), limit), nil
		}
	}
	via = r.wayOut(others)
	if via == nil || r.bare && q.unqualified() {
		// Podman's resolver does the same on internal networks. REFUSED would be more honest, but musl ignores every
		// code other than NOERROR and NXDOMAIN, and programs on an internal network would wait for its timeout.
		return q.appendAnswer(out, Answer{Missing: true, Zone: "."}), nil
	}
	if q.plain {
		var space [keySpace]byte
		if hit, ok := via.cache.get(out, q.appendKey(space[:0])); ok {
			return q.adopt(hit, limit), nil
		}
	}
	return nil, via
}

// lookup asks the sources, then those of the other resolvers: two networks may have names in one domain, and what does
// not exist on the first may on the second.
func (r *Resolver) lookup(name string, others []*Resolver) (first Answer, known bool) {
	first, known = r.own(name)
	if known && !first.Missing {
		return first, true
	}
	for _, o := range others {
		a, ok := o.own(name)
		if ok && !a.Missing {
			return a, true
		}
		if !known {
			first, known = a, ok
		}
	}
	return first, known
}

// own asks the resolver's own sources.
func (r *Resolver) own(name string) (Answer, bool) {
	for _, s := range r.sources {
		if a, ok := s.Lookup(name); ok {
			return a, true
		}
	}
	return Answer{}, false
}

// wayOut is the first that has an upstream; nil: none.
func (r *Resolver) wayOut(others []*Resolver) *Resolver {
	if r.upstream != nil {
		return r
	}
	for _, o := range others {
		if o.upstream != nil {
			return o
		}
	}
	return nil
}
