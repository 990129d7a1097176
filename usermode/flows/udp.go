package flows

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet/internal/icmperror"
)

const (
	// How long a flow is kept without a datagram. RFC 4787 asks for two minutes and allows less for ports that are
	// known to need less; 90 s is what most applications send keep-alives for. A flow that never got an answer is a
	// log line or a probe, and goes sooner.
	udpIdle    = 90 * time.Second
	dnsIdle    = 20 * time.Second
	oneWayIdle = 30 * time.Second
	dnsPort    = 53

	expiryInterval = time.Second // between two looks at all flows

	// Each flow has a socket of the host. Beyond a limit, a flow that has been idle for long makes room. A guest may
	// have containers of its own.
	maxFlows       = 16384
	maxClientFlows = 8192

	// How many flows are compared to find one that has been idle for long: looking at all of them would let a guest
	// that opens thousands in a second stall the others.
	evictionSample = 32

	shards = 64
)

// flowKey is a guest's port and the destination that it dialled.
type flowKey struct{ client, dst netip.AddrPort }

// burst is what a guest sends: a datagram, or several.
type burst struct {
	client, dst netip.AddrPort
	hops        uint8
	whole       bool   // none of them must be cut on its way
	quoted      []byte // the headers of the first
	payloads    [][]byte
}

// udpTable has the flows, each with a connected socket of the host. A datagram needs the lock of a shard only; the
// table's is for those that open and close flows, and taken first.
type udpTable struct {
	*Flows
	// The limits, and idle times, of above.
	total, each           int
	idle, idleDNS, oneWay time.Duration

	shards [shards]shard

	mu      sync.Mutex
	open    bool
	list    []*udpFlow // all flows, in no order
	resting []resting  // those that made room, the first one first
	clients map[netip.Addr]*udpClient

	evicted, refused, dropped atomic.Uint64
}

type shard struct {
	mu    sync.Mutex
	flows map[flowKey]*udpFlow
	_     [48]byte // of a cache line that two shards would share
}

// udpClient is a guest that has flows.
type udpClient struct {
	addr  netip.Addr
	flows []*udpFlow // in no order
}

func newUDPTable(f *Flows) *udpTable {
	t := &udpTable{
		Flows: f, total: maxFlows, each: maxClientFlows, idle: udpIdle, idleDNS: dnsIdle, oneWay: oneWayIdle,
		clients: make(map[netip.Addr]*udpClient),
	}
	for i := range t.shards {
		t.shards[i].flows = make(map[flowKey]*udpFlow)
	}
	return t
}

// shard is where a key's flow is. Guests that choose their ports so that all are in one only have to wait for themselves
// a little.
func (t *udpTable) shard(key flowKey) *shard {
	a, b := key.client.Addr().As16(), key.dst.Addr().As16()
	return &t.shards[(uint(a[15])+uint(b[15])*5+uint(key.client.Port())+uint(key.dst.Port())*3)%shards]
}

func (t *udpTable) find(key flowKey) *udpFlow {
	s := t.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows[key]
}

// accept opens the table for flows, or closes it and ends them all.
func (t *udpTable) accept(open bool) {
	t.mu.Lock()
	t.open = open
	var ended []*udpFlow
	for !open && len(t.list) > 0 {
		ended = append(ended, t.removeLocked(t.list[0]))
	}
	if !open {
		ended = append(ended, t.wakeLocked(len(t.resting))...)
	}
	t.mu.Unlock()
	closeAll(ended)
}

func (t *udpTable) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.list)
}

// forward sends a burst on its flow, which it makes if need be.
func (t *udpTable) forward(b *burst) {
	key := flowKey{b.client, b.dst}
	for range 3 {
		f := t.find(key)
		if f == nil {
			if f = t.admit(key, b); f == nil {
				t.refused.Add(uint64(len(b.payloads)))
				return
			}
		}
		f.last.Store(int64(t.now()))
		lost, ok := f.send(b)
		if ok {
			if lost > 0 {
				t.dropped.Add(uint64(lost))
			}
			return
		}
	}
	t.dropped.Add(uint64(len(b.payloads)))
}

// admit opens a flow for b. When that cannot be, it tells the guest why and returns nil.
func (t *udpTable) admit(key flowKey, b *burst) *udpFlow {
	if !t.isRunning() {
		return nil
	}
	v4 := key.dst.Addr().Is4()
	host, ok := t.cfg.Resolve(key.dst.Addr())
	if !ok || host.Is4() != v4 {
		t.reject(icmperror.Prohibited(v4), b, b.payloads[0])
		return nil
	}
	f := &udpFlow{table: t, key: key, host: netip.AddrPortFrom(host, key.dst.Port())}
	f.last.Store(int64(t.now()))
	err := f.dial()
	for try := 0; isExhausted(err) && try < 4 && t.makeRoom(); try++ { // somebody may be receiving by the socket that is closed
		err = f.dial()
	}
	if err != nil {
		t.cfg.Log.Debug("open a UDP flow", "client", key.client.Addr(), "dst", key.dst, "err", err)
		// That we have no descriptors or memory left is no answer. "No route" is, but a program whose socket is
		// connected would not be told: the kernel takes it for something that may pass.
		if isUnreachable(err) {
			t.reject(icmperror.PortUnreachable(v4), b, b.payloads[0])
		}
		return nil
	}
	return t.add(f)
}

// reject answers a datagram of a burst with an ICMP error.
func (t *udpTable) reject(e icmperror.Message, b *burst, payload []byte) {
	t.report(e, b.client.Addr(), b.dst.Addr(), b.quoted, payload)
}

// add puts f into the table and makes room for it if need be. Where somebody else was faster, f is closed and the other
// returned; nil where the table is closed.
func (t *udpTable) add(f *udpFlow) *udpFlow {
	s := t.shard(f.key)
	t.mu.Lock()
	s.mu.Lock()
	other := s.flows[f.key]
	if other != nil || !t.open {
		s.mu.Unlock()
		t.mu.Unlock()
		f.close()
		return other
	}
	s.flows[f.key] = f
	s.mu.Unlock()
	f.inList, t.list = len(t.list), append(t.list, f)
	addr := f.key.client.Addr()
	if f.client = t.clients[addr]; f.client == nil {
		f.client = &udpClient{addr: addr}
		t.clients[addr] = f.client
	}
	f.inClient, f.client.flows = len(f.client.flows), append(f.client.flows, f)
	var evicted *udpFlow
	if len(f.client.flows) > t.each {
		evicted = t.evictLocked(f.client, f)
	} else if len(t.list) > t.total {
		evicted = t.evictLocked(t.greediestLocked(f), f)
	}
	var over []*udpFlow
	if evicted != nil {
		over = t.restLocked(evicted)
	}
	t.mu.Unlock()
	closeAll(over)
	if !f.watch() {
		t.end(f)
		return nil
	}
	return f
}

// makeRoom closes a socket when the host has no more for us: of a flow that rests, or else of the guest that has most.
func (t *udpTable) makeRoom() bool {
	t.mu.Lock()
	var over []*udpFlow
	if len(t.resting) > 0 {
		over = t.wakeLocked(1)
	} else if len(t.list) > 0 {
		over = append(over, t.evictLocked(t.greediestLocked(nil), nil))
	}
	t.mu.Unlock()
	closeAll(over)
	return len(over) > 0
}

// greediestLocked is the guest with the most flows, or nearly: of some flows, which the newest is none of, the owner that has the most.
func (t *udpTable) greediestLocked(newest *udpFlow) *udpClient {
	var most *udpClient
	for range evictionSample {
		f := t.list[rand.IntN(len(t.list))]
		if f != newest && (most == nil || len(f.client.flows) > len(most.flows)) {
			most = f.client
		}
	}
	return most
}

// evictLocked removes a flow of c that has been idle for long: of some, the one that was for longest. It is not the new
// one. The caller closes it, or has it rest.
func (t *udpTable) evictLocked(c *udpClient, newest *udpFlow) *udpFlow {
	if c == nil {
		return nil
	}
	var oldest *udpFlow
	for i := range min(evictionSample, len(c.flows)) {
		if len(c.flows) > evictionSample {
			i = rand.IntN(len(c.flows))
		}
		if f := c.flows[i]; f != newest && (oldest == nil || f.last.Load() < oldest.last.Load()) {
			oldest = f
		}
	}
	if oldest == nil {
		return nil
	}
	t.evicted.Add(1)
	return t.removeLocked(oldest)
}

// removeLocked forgets a flow, which the caller closes.
func (t *udpTable) removeLocked(f *udpFlow) *udpFlow {
	s := t.shard(f.key)
	s.mu.Lock()
	delete(s.flows, f.key)
	s.mu.Unlock()
	last := t.list[len(t.list)-1]
	t.list[f.inList], last.inList = last, f.inList
	t.list[len(t.list)-1] = nil
	t.list = t.list[:len(t.list)-1]
	c := f.client
	last = c.flows[len(c.flows)-1]
	c.flows[f.inClient], last.inClient = last, f.inClient
	c.flows[len(c.flows)-1] = nil
	if c.flows = c.flows[:len(c.flows)-1]; len(c.flows) == 0 {
		delete(t.clients, c.addr)
	}
	f.inList = gone
	return f
}

// end removes and closes f, unless somebody has.
func (t *udpTable) end(f *udpFlow) {
	t.mu.Lock()
	there := f.inList != gone
	if there {
		t.removeLocked(f)
	}
	t.mu.Unlock()
	if there {
		f.close()
	}
}

// expire ends the flows that have been idle for long enough.
func (t *udpTable) expire() {
	now := t.now()
	var ended []*udpFlow
	t.mu.Lock()
	for i := len(t.list) - 1; i >= 0; i-- { // removing puts the last in the place of the one that goes
		if f := t.list[i]; now-time.Duration(f.last.Load()) >= t.patience(f) {
			ended = append(ended, t.removeLocked(f))
		}
	}
	ended = append(ended, t.restedLocked(now)...)
	t.mu.Unlock()
	closeAll(ended)
}

// patience is how long f may be idle.
func (t *udpTable) patience(f *udpFlow) time.Duration {
	patience := t.idle
	if f.key.dst.Port() == dnsPort {
		patience = t.idleDNS
	}
	if !f.answered.Load() {
		patience = min(patience, t.oneWay)
	}
	return patience
}

func closeAll(flows []*udpFlow) {
	for _, f := range flows {
		f.close()
	}
}
