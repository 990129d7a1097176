package vmnet

import (
	"fmt"
	"net"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/usernet/usernet/usermode/tcprelay"
)

const (
	// backlog is how many connections wait to be accepted.
	backlog = 256
	// maxServed is how many connections one port of the gateway's serves at a time, and maxMachineServed how many of them may be one
	// machine's. Requests take a moment each; DNS has a lower limit of its own.
	maxServed        = 4096
	maxMachineServed = 64
)

// listener joins a socket for each of the gateway's addresses: one for all addresses would accept what machines send to any address
// at all.
type listener struct {
	n        *Network
	sockets  []listening
	quota    *tcprelay.Quota
	accepted chan net.Conn
	closed   chan struct{}
	once     sync.Once
	wg       sync.WaitGroup
}

// listening is a socket of netstack's that listens.
type listening struct {
	tcpip.Endpoint
	queue *waiter.Queue
}

// ListenTCP listens at the gateway's addresses, of both families. What it accepts is a *Conn; a machine that has too many is reset.
func (n *Network) ListenTCP(port uint16) (net.Listener, error) {
	l := &listener{
		n: n, quota: tcprelay.NewQuota(maxServed, maxMachineServed),
		accepted: make(chan net.Conn), closed: make(chan struct{}),
	}
	fail := func(err error) (net.Listener, error) {
		l.abort()
		return nil, fmt.Errorf("listen tcp port %d in the network: %w", port, err)
	}
	for _, addr := range n.addresses.local() {
		s, err := n.listenAt(netip.AddrPortFrom(addr, port))
		if err != nil {
			return fail(err)
		}
		l.sockets = append(l.sockets, s)
	}
	if err := n.add(l); err != nil {
		return fail(err)
	}
	for _, s := range l.sockets {
		l.wg.Go(func() { l.accept(s) })
	}
	return l, nil
}

func (n *Network) listenAt(at netip.AddrPort) (listening, error) {
	queue := new(waiter.Queue)
	ep, err := n.stack.NewEndpoint(tcp.ProtocolNumber, protocolOf(at.Addr()), queue)
	if err != nil {
		return listening{}, errorOf(err)
	}
	if err = ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: fromAddr(at.Addr()), Port: at.Port()}); err == nil {
		err = ep.Listen(backlog)
	}
	if err != nil {
		ep.Close()
		return listening{}, errorOf(err)
	}
	return listening{ep, queue}, nil
}

// accept accepts connections until the listener is closed.
func (l *listener) accept(s listening) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	s.queue.EventRegister(&entry)
	defer s.queue.EventUnregister(&entry)
	for {
		ep, queue, err := s.Accept(nil)
		if err == nil {
			l.take(ep, queue)
			continue
		}
		if _, none := err.(*tcpip.ErrWouldBlock); !none {
			return
		}
		select {
		case <-ready:
		case <-l.closed:
			return
		}
	}
}

// take hands a connection to whoever accepts next, unless its machine has too many.
func (l *listener) take(ep tcpip.Endpoint, queue *waiter.Queue) {
	from, err := ep.GetRemoteAddress()
	if err != nil {
		ep.Abort() // it has ended already
		return
	}
	machine := l.n.stations.holder(toAddr(from.Addr))
	if !l.quota.Take(machine) {
		l.n.turnedAway.Add(1)
		ep.Abort()
		return
	}
	c := &Conn{gonet.NewTCPConn(queue, ep), sync.OnceFunc(func() { l.quota.Put(machine) })}
	select {
	case l.accepted <- c:
	case <-l.closed:
		c.Close()
	}
}

// Conn is a connection of a machine to a port of the gateway's.
type Conn struct {
	*gonet.TCPConn
	uncount func()
}

// Close closes the connection. It may be called again.
func (c *Conn) Close() error {
	c.uncount()
	return c.TCPConn.Close()
}

// Uncount takes the connection out of the number that its machine may have: what it has become is limited otherwise.
func (c *Conn) Uncount() { c.uncount() }

// Accept returns the next connection, or net.ErrClosed after Close, or when the network has ended.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// Close stops listening. Connections that were accepted live on.
func (l *listener) Close() error {
	l.abort()
	l.n.remove(l)
	return nil
}

func (l *listener) abort() {
	l.once.Do(func() {
		close(l.closed)
		for _, s := range l.sockets {
			s.Close()
		}
	})
	l.wg.Wait()
}

// Addr is the gateway's IPv4 address.
func (l *listener) Addr() net.Addr {
	if len(l.sockets) == 0 {
		return &net.TCPAddr{}
	}
	at, err := l.sockets[0].GetLocalAddress()
	if err != nil {
		return &net.TCPAddr{}
	}
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(toAddr(at.Addr), at.Port))
}

// ListenUDP is ListenTCP for datagrams. Addresses are *net.UDPAddr. Answers go out from the address that was asked.
func (n *Network) ListenUDP(port uint16) (net.PacketConn, error) {
	s := newUDPSocket(n)
	s.local = netip.AddrPortFrom(n.addresses.gateway, port)
	err := n.sockets.listen(s)
	if err == nil {
		if err = n.add(s); err != nil {
			s.abort()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listen udp port %d in the network: %w", port, err)
	}
	return udpListener{s}, nil
}
