// Package tcprelay carries TCP connections between a netstack and the host: those that netstack's side opens, and those that it is
// given. It works on endpoints, on any system. What packets netstack sees and where it sends its own is its link's, which the package
// only helps to set up.
package tcprelay

import (
	"cmp"
	"context"
	"log/slog"
	"math/bits"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// The usual limits.
const (
	// Connections that are being made: a client that knocks at dead addresses must leave room for the others.
	// Beyond the limits a SYN is ignored, and its sender will repeat it.
	MaxHandshakes       = 4096
	MaxClientHandshakes = 512
	// Connections that are made. Beyond the limits they are reset.
	MaxConns       = 32768
	MaxClientConns = 16384

	DialTimeout = 15 * time.Second
	// A client's kernel answers a SYN-ACK at once, if at all.
	HandshakeTimeout = 5 * time.Second
)

// Limits bound what clients may have. What is zero is as usual.
type Limits struct {
	Handshakes, ClientHandshakes int // connections that are being made
	Conns, ClientConns           int // all connections
	Dial, Handshake              time.Duration
}

// orUsual fills in what is zero.
func (l Limits) orUsual() Limits {
	usual := Limits{MaxHandshakes, MaxClientHandshakes, MaxConns, MaxClientConns, DialTimeout, HandshakeTimeout}
	for _, n := range [][2]*int{
		{&l.Handshakes, &usual.Handshakes}, {&l.ClientHandshakes, &usual.ClientHandshakes},
		{&l.Conns, &usual.Conns}, {&l.ClientConns, &usual.ClientConns},
	} {
		if *n[0] == 0 {
			*n[0] = *n[1]
		}
	}
	if l.Dial == 0 {
		l.Dial = usual.Dial
	}
	if l.Handshake == 0 {
		l.Handshake = usual.Handshake
	}
	return l
}

// keepAlive finds out within two minutes that the other end of an idle connection is gone.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// Config says where connections go.
type Config struct {
	NIC tcpip.NICID // of the stack
	// Resolve returns the address to dial on the host for the one that a client dialled, or refuses it. It is called by several
	// goroutines.
	Resolve func(netip.Addr) (netip.Addr, bool)
	// Holder returns on whose account a client's connections are; nil: its own.
	Holder func(client netip.Addr) netip.Addr
	Limits Limits
	// SendBuffer is how large a connection's send buffer is to begin with, which becomes a queue where the client's link is slower
	// than the host; ReceiveBuffer, of which half is offered as window, how large the other one is. 0: Buffer.
	SendBuffer, ReceiveBuffer int
	Log                       *slog.Logger
}

// Relays carries TCP connections on: for every SYN a connection of the host is dialled, and only when that
// stands is the client's handshake completed.
type Relays struct {
	cfg       Config
	stack     *stack.Stack
	forwarder *tcp.Forwarder
	dialer    net.Dialer
	pending   *Quota // connections that are being made
	made      *Quota

	ctx    context.Context // done: no new connections, and those there are end
	cancel context.CancelFunc
	joined sync.WaitGroup // handlers, from the SYN on, and the crew
	crew   crew
	relays sync.WaitGroup // those of them that relay, and Join
	used   sync.Map       // the endpoints of relays

	mu     sync.Mutex
	closed bool // joined and relays must not grow any more
	conns  int
	level  atomic.Int32 // how many times the buffers are halved; changed under mu
}

// New makes the relays of a stack of NewStack's, whose handler of TCP is to be HandlePacket. Opens is to see SYNs before the stack does.
func New(st *stack.Stack, cfg Config) *Relays {
	cfg.Limits = cfg.Limits.orUsual()
	cfg.SendBuffer = cmp.Or(cfg.SendBuffer, Buffer)
	cfg.ReceiveBuffer = cmp.Or(cfg.ReceiveBuffer, Buffer)
	if cfg.Holder == nil {
		cfg.Holder = func(client netip.Addr) netip.Addr { return client }
	}
	t := &Relays{
		cfg:     cfg,
		stack:   st,
		dialer:  net.Dialer{Timeout: cfg.Limits.Dial, KeepAliveConfig: keepAlive},
		pending: NewQuota(cfg.Limits.Handshakes, cfg.Limits.ClientHandshakes),
		made:    NewQuota(cfg.Limits.Conns, cfg.Limits.ClientConns),
	}
	// Plain TCP, which is what the client asked for, whatever GODEBUG=multipathtcp says.
	t.dialer.SetMultipathTCP(false)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.crew = newCrew(t.ctx.Done(), &t.joined)
	t.forwarder = tcp.NewForwarder(st, 0, cfg.Limits.Handshakes, t.handle)
	return t
}

// HandlePacket is the stack's handler for segments that belong to no connection.
func (t *Relays) HandlePacket(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	return t.forwarder.HandlePacket(id, pkt)
}

// Close resets the connections and returns when nothing is relayed any more. Handshakes go on until the stack is closed, which must
// not be before: its Close takes back the memory of segments that are being written.
func (t *Relays) Close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.cancel()
	t.relays.Wait()
}

// Wait joins what Close left, after the stack's Close.
func (t *Relays) Wait() { t.joined.Wait() }

// Stats is what there is at the moment, and what has been turned away.
type Stats struct {
	Conns   int    // from netstack's side, that stand
	Pending int    // that are being made
	Refused uint64 // beyond the limits, reset
	Ignored uint64 // SYNs beyond the limit of connections that are being made
}

// Stats may be called at any time.
func (t *Relays) Stats() Stats {
	var st Stats
	st.Pending, st.Ignored = t.pending.Counts()
	st.Conns, st.Refused = t.made.Counts()
	st.Conns -= st.Pending // which count as made from the beginning
	return st
}

// begin adds to wg unless Close was called.
func (t *Relays) begin(wg *sync.WaitGroup) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		wg.Add(1)
	}
	return !t.closed
}

// handle is called by the forwarder, in a goroutine of its own.
func (t *Relays) handle(r *tcp.ForwarderRequest) {
	if !t.begin(&t.joined) {
		r.Complete(false)
		return
	}
	t.crew.do(func() {
		defer t.joined.Done()
		t.serve(r)
	})
}

// serve sees to one connection until its end.
func (t *Relays) serve(r *tcp.ForwarderRequest) {
	holder := t.cfg.Holder(addrOf(r.ID().RemoteAddress))
	if !t.made.Take(holder) {
		r.Complete(true)
		return
	}
	defer t.made.Put(holder)
	if !t.pending.Take(holder) {
		r.Complete(false)
		return
	}
	ep, queue, host := t.connect(r)
	t.pending.Put(holder)
	if ep != nil {
		t.join(t.ctx, ep, queue, host)
	}
}

// Join relays between an endpoint that is connected, whose events are queue's, and host, until both have ended, ctx has, or Close is called,
// and closes both: unless they have ended, with a reset. Segments that came for ep go to a *net.TCPConn or a *net.UnixConn without
// being copied. Where host has no CloseWrite it is closed when ep's peer has ended.
func (t *Relays) Join(ctx context.Context, ep tcpip.Endpoint, queue *waiter.Queue, host net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.ctx, cancel)()
	t.join(ctx, ep, queue, host)
}

func (t *Relays) join(ctx context.Context, ep tcpip.Endpoint, queue *waiter.Queue, host conn) {
	r := newRelay(ep, queue, host, &t.level, &t.crew)
	if !t.begin(&t.relays) {
		r.reset()
		return
	}
	defer t.relays.Done()
	t.used.Store(ep, nil)
	defer t.used.Delete(ep)
	t.tune(ep)
	t.account(1)
	defer t.account(-1)
	r.run(ctx)
}

// connect makes both halves of the connection. When it cannot, it returns nil and has answered the client.
//
// That answer is always a reset, whatever was wrong with the host's dial. For a SYN without an answer a client
// would wait minutes, and the ICMP errors that say "unreachable" are hints that Linux keeps to itself until its
// retries are used up (RFC 1122, 4.2.3.9). A reset lets the application try its next address now.
func (t *Relays) connect(r *tcp.ForwarderRequest) (tcpip.Endpoint, *waiter.Queue, conn) {
	id := r.ID()
	addr, ok := t.cfg.Resolve(addrOf(id.LocalAddress))
	if !ok {
		r.Complete(true)
		return nil, nil, nil
	}
	dst := netip.AddrPortFrom(addr, id.LocalPort)
	// Without binding to an address and port 0 first, as DialTCP does: a port that is chosen before the destination is known is one that no
	// other connection of the host's can have.
	host, err := t.dial(dst)
	if err != nil {
		t.cfg.Log.Debug("dial for a client", "client", addrOf(id.RemoteAddress), "err", err)
		r.Complete(true)
		return nil, nil, nil
	}
	queue := new(waiter.Queue)
	giveUp := time.AfterFunc(t.cfg.Limits.Handshake, func() { t.abortHandshake(id) })
	ep, terr := r.CreateEndpoint(queue)
	giveUp.Stop()
	r.Complete(terr != nil)
	if terr != nil {
		reset(host) // what the host's end learns is what happened: nobody there
		return nil, nil, nil
	}
	return ep, queue, host
}

// abortHandshake ends the handshake of id, if it is still going on. CreateEndpoint waits for it and has no timeout.
func (t *Relays) abortHandshake(id stack.TransportEndpointID) {
	if ep := t.find(id); ep != nil {
		ep.Abort()
	}
}

// tune sets a connection's options.
func (t *Relays) tune(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(keepAlive.Idle)
	interval := tcpip.KeepaliveIntervalOption(keepAlive.Interval)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAlive.Count)
	// A client that was killed with its network takes no FIN back.
	ep.SocketOptions().SetKeepAlive(true)

	// What it was made with is the forwarder's and the protocol's default.
	level := int(t.level.Load())
	ep.SocketOptions().SetReceiveBufferSize(int64(halved(t.cfg.ReceiveBuffer, level)), false)
	ep.SocketOptions().SetSendBufferSize(int64(min(halved(Buffer, level), t.cfg.SendBuffer)), true) // true: netstack does not tune it
}

// manyConns is the number of connections that may have the full buffers. With twice as many each gets half, and
// so on: netstack has no limit for all connections together as Linux has (tcp_mem), and those of a client that
// never reads would add up.
const (
	manyConns = 128
	maxLevel  = 6
)

// account changes the number of connections, and the size of buffers with it.
func (t *Relays) account(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns += n
	level, old := min(bits.Len(uint(t.conns/manyConns)), maxLevel), int(t.level.Load())
	// Not up and down again with every connection at the border.
	if level > old || level < old-1 || t.conns == 0 && old > 0 {
		if err := setBuffers(t.stack, level); err == nil {
			t.level.Store(int32(level))
		}
	}
}

func addrOf(a tcpip.Address) netip.Addr {
	if a.Len() == header.IPv4AddressSize {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16())
}
