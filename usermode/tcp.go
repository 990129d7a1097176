package usermode

import (
	"context"
	"math/bits"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// Connections that are being made: a container that knocks at dead addresses must leave room for the others.
	// Beyond the limits a SYN is ignored, and its sender will repeat it.
	maxHandshakes       = 4096
	maxClientHandshakes = 512
	// Connections that are made.
	maxConns       = 32768
	maxClientConns = 16384

	connectTimeout = 15 * time.Second
	// A container's kernel answers a SYN-ACK at once, if at all.
	handshakeTimeout = 5 * time.Second
)

// keepAlive finds out within two minutes that the other end of an idle connection is gone.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// tcpRelays carries TCP connections on: for every SYN a connection of the host is dialled, and only when that
// stands is the container's handshake completed.
type tcpRelays struct {
	cfg       netstackConfig
	stack     *stack.Stack
	forwarder *tcp.Forwarder
	dialer    net.Dialer
	pending   *quota // connections that are being made
	made      *quota
	patience  time.Duration // handshakeTimeout

	ctx    context.Context // done: no new connections, and those there are end
	cancel context.CancelFunc
	joined sync.WaitGroup // handlers, from the SYN on
	relays sync.WaitGroup // those of them that relay

	mu     sync.Mutex
	closed bool // joined and relays must not grow any more
	conns  int
	level  atomic.Int32 // how many times the buffers are halved; changed under mu
}

func newTCPRelays(st *stack.Stack, cfg netstackConfig) *tcpRelays {
	t := &tcpRelays{
		cfg:     cfg,
		stack:   st,
		dialer:  net.Dialer{Timeout: connectTimeout, KeepAliveConfig: keepAlive},
		pending: newQuota(maxHandshakes, maxClientHandshakes),
		made:    newQuota(maxConns, maxClientConns),

		patience: handshakeTimeout,
	}
	// Plain TCP, which is what the container asked for, whatever GODEBUG=multipathtcp says.
	t.dialer.SetMultipathTCP(false)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.forwarder = tcp.NewForwarder(st, 0, maxHandshakes, t.handle)
	return t
}

// close ends the relays and returns when they have. Handshakes go on until the stack is closed.
func (t *tcpRelays) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.cancel()
	t.relays.Wait()
}

// wait joins what close left.
func (t *tcpRelays) wait() { t.joined.Wait() }

// begin adds to wg unless close was called.
func (t *tcpRelays) begin(wg *sync.WaitGroup) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		wg.Add(1)
	}
	return !t.closed
}

// handle sees to one connection until its end. The forwarder calls it in a goroutine of its own.
func (t *tcpRelays) handle(r *tcp.ForwarderRequest) {
	if !t.begin(&t.joined) {
		r.Complete(false)
		return
	}
	defer t.joined.Done()
	client := toAddr(r.ID().RemoteAddress)
	if !t.made.take(client) {
		r.Complete(true)
		return
	}
	defer t.made.put(client)
	if !t.pending.take(client) {
		r.Complete(false)
		return
	}
	conn := t.connect(r)
	t.pending.put(client)
	if conn == nil {
		return
	}
	if !t.begin(&t.relays) {
		conn.reset()
		return
	}
	defer t.relays.Done()
	conn.run(t.ctx)
}

// connect makes both halves of the connection. When it cannot, it returns nil and has answered the container.
//
// That answer is always a reset, whatever was wrong with the host's dial. For a SYN without an answer a container
// would wait minutes, and the ICMP errors that say "unreachable" are hints that Linux keeps to itself until its
// retries are used up (RFC 1122, 4.2.3.9). A reset lets the application try its next address now.
func (t *tcpRelays) connect(r *tcp.ForwarderRequest) *accounted {
	id := r.ID()
	addr, ok := t.cfg.Resolve(toAddr(id.LocalAddress))
	if !ok {
		r.Complete(true)
		return nil
	}
	dst := netip.AddrPortFrom(addr, id.LocalPort)
	host, err := t.dialer.DialTCP(t.ctx, "tcp", netip.AddrPort{}, dst)
	if err != nil {
		t.cfg.Log.Debug("dial for a container", "client", toAddr(id.RemoteAddress), "err", err)
		r.Complete(true)
		return nil
	}
	queue := new(waiter.Queue)
	giveUp := time.AfterFunc(t.patience, func() { t.abortHandshake(id) })
	ep, terr := r.CreateEndpoint(queue)
	giveUp.Stop()
	r.Complete(terr != nil)
	if terr != nil {
		host.SetLinger(0) // what the host's end learns is what happened: nobody there
		host.Close()
		return nil
	}
	t.tune(ep)
	return &accounted{newRelay(ep, queue, host, &t.level), t}
}

// accounted is a relay that counts among netstack's connections while it runs.
type accounted struct {
	*relay
	of *tcpRelays
}

func (a *accounted) run(ctx context.Context) {
	a.of.account(1)
	defer a.of.account(-1)
	a.relay.run(ctx)
}

// abortHandshake ends the handshake of id, if it is still going on. CreateEndpoint waits for it and has no timeout.
func (t *tcpRelays) abortHandshake(id stack.TransportEndpointID) {
	proto := protocolOf(id.LocalAddress)
	if ep := t.stack.FindTransportEndpoint(proto, tcp.ProtocolNumber, id, nicID); ep != nil {
		ep.Abort()
	}
}

// tune sets an accepted connection's options.
func (t *tcpRelays) tune(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(keepAlive.Idle)
	interval := tcpip.KeepaliveIntervalOption(keepAlive.Interval)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, keepAlive.Count)
	// A container that was killed with its network takes no FIN back.
	ep.SocketOptions().SetKeepAlive(true)

	// What it was made with is the forwarder's and the protocol's default.
	size := int64(bufferAt(int(t.level.Load())))
	ep.SocketOptions().SetReceiveBufferSize(size, false)
	ep.SocketOptions().SetSendBufferSize(size, true) // true: netstack does not tune it
}

// manyConns is the number of connections that may have the full buffers. With twice as many each gets half, and
// so on: netstack has no limit for all connections together as Linux has (tcp_mem), and those of a container that
// never reads would add up.
const (
	manyConns = 128
	maxLevel  = 6
)

// account changes the number of connections, and the size of buffers with it.
func (t *tcpRelays) account(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns += n
	level, old := min(bits.Len(uint(t.conns/manyConns)), maxLevel), int(t.level.Load())
	// Not up and down again with every connection at the border.
	if level > old || level < old-1 || t.conns == 0 && old > 0 {
		if err := setTCPBuffers(t.stack, level); err == nil {
			t.level.Store(int32(level))
		}
	}
}
