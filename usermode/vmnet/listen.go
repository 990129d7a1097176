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
)

// listener joins a listener for each of the gateway's addresses: netstack's own for all addresses would accept what machines send
// to any address at all.
type listener struct {
	n        *Network
	parts    []net.Listener
	accepted chan net.Conn
	closed   chan struct{}
	once     sync.Once
	wg       sync.WaitGroup
}

// ListenTCP listens at the gateway's addresses, of both families.
func (n *Network) ListenTCP(port uint16) (net.Listener, error) {
	l := &listener{n: n, accepted: make(chan net.Conn), closed: make(chan struct{})}
	fail := func(err error) (net.Listener, error) {
		l.abort()
		return nil, fmt.Errorf("listen tcp port %d in the network: %w", port, err)
	}
	for _, addr := range n.addresses.local() {
		part, err := n.listenAt(netip.AddrPortFrom(addr, port))
		if err != nil {
			return fail(err)
		}
		l.parts = append(l.parts, part)
	}
	if err := n.add(l); err != nil {
		return fail(err)
	}
	for _, part := range l.parts {
		l.wg.Go(func() { l.accept(part) })
	}
	return l, nil
}

// backlog is how many connections wait to be accepted.
const backlog = 256

func (n *Network) listenAt(at netip.AddrPort) (net.Listener, error) {
	queue := new(waiter.Queue)
	ep, err := n.stack.NewEndpoint(tcp.ProtocolNumber, protocolOf(at.Addr()), queue)
	if err != nil {
		return nil, errorOf(err)
	}
	if err = ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: fromAddr(at.Addr()), Port: at.Port()}); err == nil {
		err = ep.Listen(backlog)
	}
	if err != nil {
		ep.Close()
		return nil, errorOf(err)
	}
	return gonet.NewTCPListener(n.stack, queue, ep), nil
}

func (l *listener) accept(part net.Listener) {
	for {
		c, err := part.Accept()
		if err != nil {
			return
		}
		select {
		case l.accepted <- c:
		case <-l.closed:
			c.Close()
			return
		}
	}
}

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
		for _, part := range l.parts {
			part.Close()
		}
	})
	l.wg.Wait()
}

// Addr is the gateway's IPv4 address.
func (l *listener) Addr() net.Addr {
	if len(l.parts) == 0 {
		return &net.TCPAddr{}
	}
	return l.parts[0].Addr()
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
