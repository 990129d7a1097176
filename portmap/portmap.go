// Package portmap publishes ports of containers: it listens on the host and relays every connection and every UDP
// flow to the container through a Dialer. It is not a firewall and knows nothing of gateways or networks; where the
// kernel carries a port's traffic itself, it only keeps the port from being given away twice.
package portmap

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/undo"
)

// Dialer opens the container's side of a connection, without waiting for it: StartTCP returns a non-blocking socket
// on which connect(2) was called, and DialUDP one that is connected. The caller closes what they return.
//
// client is the address the traffic came from. A Dialer that can shows it to the container as the source. It may be
// of the other family than target, and a link-local one carries its zone; then, or when the container already has a
// connection from that address and port, the Dialer takes an address of its own.
type Dialer interface {
	StartTCP(client, target netip.AddrPort) (fd int, err error)
	DialUDP(client, target netip.AddrPort) (fd int, err error)
}

// Request is one port to publish.
type Request struct {
	Owner string // who will hold the port, shown to the next one who wants it: "endpoint 1a2b3c4d5e6f"
	Port  usernet.Port

	// Addr4 and Addr6 are the container's addresses; one may be zero. Clients of either family then reach the
	// other one.
	Addr4, Addr6 netip.Addr

	Dialer Dialer // unused for SCTP
}

// check returns the request in its normal form, or an error that wraps usernet.ErrInvalid.
func (r Request) check() (Request, error) {
	invalid := func(format string, args ...any) (Request, error) {
		return Request{}, fmt.Errorf("publish %s: %s: %w", r.Port, fmt.Sprintf(format, args...), usernet.ErrInvalid)
	}
	p := &r.Port
	switch p.Proto {
	case usernet.TCP, usernet.UDP, usernet.SCTP:
	default:
		return invalid("protocol %q", p.Proto)
	}
	p.HostIP, r.Addr4, r.Addr6 = p.HostIP.Unmap(), r.Addr4.Unmap(), r.Addr6.Unmap()
	if p.HostPortEnd == 0 {
		p.HostPortEnd = p.HostPort
	}
	switch {
	case p.HostPortEnd < p.HostPort:
		return invalid("the range ends before it starts")
	case p.HostPort == 0 && p.HostPortEnd != 0:
		return invalid("a range cannot start at port 0")
	case p.ContainerPort == 0:
		return invalid("a container has no port 0")
	case p.HostIP.IsMulticast():
		return invalid("%s is a multicast address", p.HostIP)
	case !r.Addr4.IsValid() && !r.Addr6.IsValid():
		return invalid("the container has no address")
	case r.Addr4.IsValid() && !r.Addr4.Is4():
		return invalid("%s is not an IPv4 address", r.Addr4)
	case r.Addr6.IsValid() && !r.Addr6.Is6():
		return invalid("%s is not an IPv6 address", r.Addr6)
	case r.Dialer == nil && p.Proto != usernet.SCTP:
		return invalid("no dialer")
	}
	return r, nil
}

// targets are where clients of the host address a are sent: to the container's address of the same family, or else to
// the other one.
func (r Request) targets(a netip.Addr) []netip.AddrPort {
	addrs := []netip.Addr{r.Addr4, r.Addr6}
	if a.Is6() {
		slices.Reverse(addrs)
	}
	var to []netip.AddrPort
	for _, a := range addrs {
		if a.IsValid() {
			to = append(to, netip.AddrPortFrom(a, r.Port.ContainerPort))
		}
	}
	return to
}

// limits bound what the clients of one forward may use.
type limits struct {
	conns int           // TCP connections at a time
	flows int           // UDP flows at a time
	dial  time.Duration // for the container to accept a connection
	idle  time.Duration // a UDP flow ends this long after its last packet
}

// Mapper publishes ports and remembers who holds which. It is safe for concurrent use.
type Mapper struct {
	log     *slog.Logger
	limits  limits
	table   table
	batches sync.Pool // of *batch, for all UDP flows
}

// New returns a Mapper that holds no ports. It logs refused clients at debug level and a lack of descriptors as a
// warning.
func New(log *slog.Logger) *Mapper {
	return &Mapper{
		log:     log,
		limits:  limits{conns: 32768, flows: 4096, dial: 10 * time.Second, idle: 90 * time.Second},
		table:   table{held: make(map[slot][]holding)},
		batches: sync.Pool{New: newBatch},
	}
}

// Publish makes req's port reachable on the host and returns once it is; the caller closes the Forward.
//
// Without a host address it listens on all addresses of both families with one port number (of IPv4 only, on a host
// without IPv6). Without a host port it takes one that is free at all of them, from a range the first such.
//
// A port that somebody holds gives an error that wraps usernet.ErrPortTaken and names the holder; a request that
// can never succeed gives one that wraps usernet.ErrInvalid.
//
// SCTP ports are only reserved: the Forward carries no traffic.
func (m *Mapper) Publish(req Request) (*Forward, error) {
	req, err := req.check()
	if err != nil {
		return nil, err
	}
	c, err := m.claim(req)
	if err != nil {
		return nil, err
	}
	return m.start(req, c), nil
}

// claim takes the first free one of the ports that would do.
func (m *Mapper) claim(req Request) (*claim, error) {
	ports, err := candidates(req.Port)
	if err != nil {
		return nil, err
	}
	// What the kernel chose in vain stays bound until the end, or it would choose the same again.
	var spoiled undo.List
	defer spoiled.Close()
	var first *takenError
	for _, port := range ports {
		c, err := m.try(req, port)
		if err == nil {
			return c, nil
		}
		spoiled.Push(c.undo.Close)
		taken, ok := errors.AsType[*takenError](err)
		if !ok {
			return nil, err
		}
		if first == nil {
			first = taken
		}
		if port != 0 {
			if err := spoiled.Close(); err != nil {
				return nil, err
			}
		}
	}
	// Only the error that is shown is worth a walk through /proc.
	first.findHolder()
	switch p := req.Port; {
	case p.HostPort == 0:
		return nil, fmt.Errorf("choose a free %s port: %w", p.Proto, first)
	case p.HostPortEnd > p.HostPort:
		return nil, fmt.Errorf("no free port in %d-%d: %w", p.HostPort, p.HostPortEnd, first)
	}
	return nil, first
}
