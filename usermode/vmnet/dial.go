package vmnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/usernet/usernet/usermode/tcprelay"
)

var (
	errNotInside = errors.New("not a machine's address of the network")
	errTooMany   = errors.New("too many connections")
)

// DialTCP connects to a machine, which sees client as who it is talking to: or the gateway, if client is zero, a loopback or other
// special address, of the network itself or of the other family than to. When client's port is in use already the
// machine sees another one. It takes tcprelay.DialTimeout at most.
func (n *Network) DialTCP(ctx context.Context, client, to netip.AddrPort) (net.Conn, error) {
	ep, queue, err := n.dial(ctx, client, to)
	if err != nil {
		return nil, fmt.Errorf("dial tcp %s: %w", to, err)
	}
	return gonet.NewTCPConn(queue, ep), nil
}

// JoinTCP connects to a machine as DialTCP does and relays between that connection and host, which it owns, until both have ended, or
// ctx or Run does, which resets both. There is an error only if the machine was not reached; host has been closed with a reset then.
func (n *Network) JoinTCP(ctx context.Context, host net.Conn, client, to netip.AddrPort) error {
	fail := func(err error) error {
		if c, ok := host.(interface{ SetLinger(sec int) error }); ok {
			c.SetLinger(0)
		}
		host.Close()
		return fmt.Errorf("dial tcp %s: %w", to, err)
	}
	if err := n.begin(); err != nil {
		return fail(err)
	}
	defer n.joins.Done()
	machine := n.stations.holder(to.Addr().Unmap())
	if !n.inbound.Take(machine) {
		return fail(errTooMany)
	}
	defer n.inbound.Put(machine)
	if !n.dialling.Take(machine) {
		return fail(errTooMany)
	}
	ep, queue, err := n.dial(ctx, client, to)
	n.dialling.Put(machine)
	if err != nil {
		return fail(err)
	}
	n.relays.Join(ctx, ep, queue, host)
	return nil
}

// begin enters a JoinTCP, which Close waits for.
func (n *Network) begin() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ending {
		return errClosed
	}
	n.joins.Add(1)
	return nil
}

// DialUDP is DialTCP for datagrams. A read returns ECONNREFUSED when the machine says that nobody listens. The connection is an
// io.WriterTo, which calls Write once for each datagram, and returns the error of either: it holds no memory while none comes.
func (n *Network) DialUDP(client, to netip.AddrPort) (net.Conn, error) {
	s, err := n.dialUDP(client, netip.AddrPortFrom(to.Addr().Unmap(), to.Port()))
	if err != nil {
		return nil, fmt.Errorf("dial udp %s: %w", to, err)
	}
	return udpConn{s}, nil
}

func (n *Network) dialUDP(client, to netip.AddrPort) (*udpSocket, error) {
	if !n.addresses.isMachine(to.Addr()) {
		return nil, errNotInside
	}
	s := newUDPSocket(n)
	err := error(syscall.EADDRINUSE)
	for _, from := range n.addresses.sources(client, to.Addr()) {
		if err = n.sockets.connect(s, udpRoute{to, from}); err != syscall.EADDRINUSE {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	if err := n.add(s); err != nil {
		s.abort()
		return nil, err
	}
	return s, nil
}

// isMachine tells whether addr may be a machine's.
func (a *addresses) isMachine(addr netip.Addr) bool {
	return a.isInside(addr) && !a.own[addr] && addr != a.broadcast && addr != a.subnet.Addr()
}

// sources are the local addresses to try for a client, best first.
func (a *addresses) sources(client netip.AddrPort, to netip.Addr) []netip.AddrPort {
	gateway := netip.AddrPortFrom(a.gatewayFor(to), 0)
	addr := client.Addr().Unmap()
	if !a.stands(addr, to) {
		return []netip.AddrPort{gateway}
	}
	return []netip.AddrPort{netip.AddrPortFrom(addr, client.Port()), netip.AddrPortFrom(addr, 0), gateway}
}

// dial connects an endpoint to a machine.
func (n *Network) dial(ctx context.Context, client, to netip.AddrPort) (tcpip.Endpoint, *waiter.Queue, error) {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if !n.addresses.isMachine(to.Addr()) {
		return nil, nil, errNotInside
	}
	if n.closed.Load() {
		return nil, nil, errClosed
	}
	ctx, cancel := context.WithTimeout(ctx, tcprelay.DialTimeout)
	defer cancel()
	var err error
	for _, from := range n.addresses.sources(client, to.Addr()) {
		queue := new(waiter.Queue)
		var ep tcpip.Endpoint
		if ep, err = n.connect(ctx, queue, from, to); err == nil {
			return ep, queue, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, nil, err
}

func (n *Network) connect(ctx context.Context, queue *waiter.Queue, from, to netip.AddrPort) (_ tcpip.Endpoint, err error) {
	ep, terr := n.stack.NewEndpoint(tcp.ProtocolNumber, protocolOf(to.Addr()), queue)
	if terr != nil {
		return nil, errorOf(terr)
	}
	defer func() {
		if err != nil {
			ep.Abort()
		}
	}()
	// One client may have connections to several machines; Connect finds out about true collisions. A port that netstack chooses is to be
	// one that nobody has.
	ep.SocketOptions().SetReuseAddress(from.Port() != 0)
	if terr := ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: fromAddr(from.Addr()), Port: from.Port()}); terr != nil {
		return nil, errorOf(terr)
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	terr = ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: fromAddr(to.Addr()), Port: to.Port()})
	if _, started := terr.(*tcpip.ErrConnectStarted); !started {
		return ep, errorOf(terr)
	}
	select {
	case <-ready:
		return ep, errorOf(ep.LastError())
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, os.ErrDeadlineExceeded
		}
		return nil, ctx.Err()
	case <-n.done:
		return nil, errClosed
	}
}

// errorOf makes an error of the system of what netstack says.
func errorOf(err tcpip.Error) error {
	switch err.(type) {
	case nil:
		return nil
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrConnectionReset, *tcpip.ErrConnectionAborted:
		return syscall.ECONNRESET
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrPortInUse, *tcpip.ErrDuplicateAddress, *tcpip.ErrNoPortAvailable, *tcpip.ErrBadLocalAddress: // the last is what Connect makes of the first
		return syscall.EADDRINUSE
	}
	return errors.New(err.String())
}
