package portmap

import (
	"net/netip"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
	"github.com/usernet/usernet/internal/splice"
)

// flowKey tells flows apart. A client may speak to several of the host's addresses from one socket; those are
// separate flows, since each must be answered from the address it was sent to.
type flowKey struct {
	client netip.AddrPort // without a zone
	scope  uint32         // of a link-local client
	local  destination    // zero: the listener has one address only
}

// source is the client as a Dialer is told.
func (k flowKey) source() netip.AddrPort {
	if k.scope == 0 {
		return k.client
	}
	return netip.AddrPortFrom(k.client.Addr().WithZone(strconv.FormatUint(uint64(k.scope), 10)), k.client.Port())
}

// flow is what one client says to the container and hears from it.
type flow struct {
	key     flowKey
	in, out route // to the container, by a socket of the flow's own, and to the client, by the listener's
	watch   *splice.Watch

	last         int64 // when the last packet passed either way, on the table's clock
	newer, older *flow // in the table's order
}

// newFlow dials the container for a client, whose struct sockaddr is name.
func (s *datagrams) newFlow(key flowKey, l *udpListener, name []byte) (*flow, error) {
	fd, err := s.dialer.DialUDP(key.source(), l.target)
	if err != nil {
		return nil, err
	}
	roomy(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, flowBuffer)
	takeWhole(fd)
	single := !nonblock.CutsDatagrams()
	f := &flow{
		key: key,
		in:  route{fd: fd, single: single},
		out: route{fd: l.fd, name: slices.Clone(name), source: key.local.control(), single: single},
	}
	if f.watch, err = s.watcher.Add(fd, func() { s.answer(f) }); err != nil {
		unix.Close(fd)
		return nil, err
	}
	s.counters.accepted.Add(1)
	s.counters.active.Add(1)
	return f, nil
}

func (s *datagrams) endFlow(f *flow) {
	s.flows.remove(f)
	s.watcher.Remove(f.watch)
	unix.Close(f.in.fd)
	s.counters.active.Add(-1)
}

// isICMP reports whether err only says that an earlier datagram did not arrive; see icmp(7).
func isICMP(err error) bool {
	switch err {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET,
		unix.ENOPROTOOPT, unix.EMSGSIZE, unix.EOPNOTSUPP, unix.EPROTO, unix.EACCES:
		return true
	}
	return false
}

// flowTable is the flows of one forward, in the order of their last packets.
type flowTable struct {
	max   int
	idle  time.Duration
	start time.Time // when its clock was 0
	flows map[flowKey]*flow
	ends  flow // of the list: its older is the newest, its newer the oldest
}

func newFlowTable(l limits) *flowTable {
	t := &flowTable{max: l.flows, idle: l.idle, start: time.Now(), flows: make(map[flowKey]*flow)}
	t.ends.newer, t.ends.older = &t.ends, &t.ends
	return t
}

// now is the table's clock: monotonic, in nanoseconds.
func (t *flowTable) now() int64 { return int64(time.Since(t.start)) }

// use returns the flow of key, or nil, and notes that a packet passes.
func (t *flowTable) use(key flowKey, now int64) *flow {
	f := t.flows[key]
	if f != nil {
		t.touch(f, now)
	}
	return f
}

// touch notes that a packet passes.
func (t *flowTable) touch(f *flow, now int64) {
	f.unlink()
	t.link(f, now)
}

// add puts a new flow in. Where there are too many, the caller ends the one that it returns, which has been idle for
// longest.
func (t *flowTable) add(f *flow, now int64) (evicted *flow) {
	if len(t.flows) >= t.max {
		evicted = t.idlest()
	}
	t.flows[f.key] = f
	t.link(f, now)
	return evicted
}

// remove takes f out.
func (t *flowTable) remove(f *flow) {
	delete(t.flows, f.key)
	f.unlink()
}

// idlest is the flow that has been idle for longest; nil: there is none.
func (t *flowTable) idlest() *flow {
	if t.ends.newer == &t.ends {
		return nil
	}
	return t.ends.newer
}

// expired is a flow that has been idle for too long, or nil.
func (t *flowTable) expired(now int64) *flow {
	if f := t.idlest(); f != nil && t.left(f, now) <= 0 {
		return f
	}
	return nil
}

// left is how long f may still be idle.
func (t *flowTable) left(f *flow, now int64) time.Duration {
	return t.idle - time.Duration(now-f.last)
}

func (t *flowTable) link(f *flow, now int64) {
	f.last = now
	f.newer, f.older = &t.ends, t.ends.older
	f.older.newer, t.ends.older = f, f
}

func (f *flow) unlink() {
	f.newer.older, f.older.newer = f.older, f.newer
}
