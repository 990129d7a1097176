package forward

import (
	"container/list"
	"net/netip"
	"time"
)

// flowKey tells flows apart. A client may speak to several of the host's addresses from one socket; those are separate flows,
// since each must be answered from the address it was sent to.
type flowKey struct {
	client netip.AddrPort
	local  local // zero: the socket has one address only
}

// local is an address of the host that datagrams came to.
type local struct {
	addr  netip.Addr
	index int // of the interface, where the address is a link-local one
}

// flowTable is the flows of a forward, in the order of their last datagrams.
type flowTable struct {
	max   int
	idle  time.Duration
	flows map[flowKey]*flow
	order *list.List // of *flow, the idlest in front
}

// entry is a flow's place in the table.
type entry struct {
	last time.Time     // when the last datagram passed, either way
	at   *list.Element // nil: not in the table
}

func newFlowTable(most int, idle time.Duration) *flowTable {
	return &flowTable{max: most, idle: idle, flows: make(map[flowKey]*flow), order: list.New()}
}

// use returns the flow of key, or nil, and notes that a datagram passes.
func (t *flowTable) use(key flowKey, now time.Time) *flow {
	f := t.flows[key]
	if f != nil {
		t.touch(f, now)
	}
	return f
}

// touch notes that a datagram passes.
func (t *flowTable) touch(f *flow, now time.Time) {
	if t.has(f) {
		f.last = now
		t.order.MoveToBack(f.at)
	}
}

// add puts a new flow in. Where there are too many, it takes the one out that has been idle for longest, for the caller to end.
func (t *flowTable) add(f *flow, now time.Time) (evicted *flow) {
	if len(t.flows) >= t.max {
		evicted = t.order.Front().Value.(*flow)
		t.remove(evicted)
	}
	f.last, f.at = now, t.order.PushBack(f)
	t.flows[f.key] = f
	return evicted
}

func (t *flowTable) has(f *flow) bool { return f.at != nil }

// remove takes f out, if it is there.
func (t *flowTable) remove(f *flow) {
	if t.has(f) {
		t.order.Remove(f.at)
		f.at = nil
		delete(t.flows, f.key)
	}
}

// left is how long f may still be idle.
func (t *flowTable) left(f *flow, now time.Time) time.Duration { return t.idle - now.Sub(f.last) }
