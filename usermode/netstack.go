package usermode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/usernet/usernet/usermode/tcprelay"
)

// nicID is the one NIC of a netstack.
const nicID tcpip.NICID = 1

// netstackConfig is what a netstack needs to know.
type netstackConfig struct {
	// MTU of the TUN, in bytes, 1280 to 65535.
	MTU int
	// Offload tells that the TUN was given TUN_F_CSUM, TUN_F_TSO4 and TUN_F_TSO6. Without it packets come and go
	// complete and no longer than the MTU; the virtio header is there all the same.
	Offload bool
	// Resolve returns the address to dial on the host for the one that a container dialled, or refuses it. It is
	// called by several goroutines, some of which carry everybody's packets: it must not wait.
	Resolve func(netip.Addr) (netip.Addr, bool)
	// Sources are the addresses that packets may come from; with none, any. A container that makes up its address
	// would otherwise be as many clients as it likes, to limits that are per client.
	Sources []netip.Prefix
	// TCP bounds connections.
	TCP tcprelay.Limits
	// Fast takes TCP connections over once their destinations have answered; nil leaves them to netstack.
	Fast *fastPath
	Log  *slog.Logger
}

// netstack carries the packets of a TUN on by ordinary sockets of this process: it is the other end of every TCP
// connection, UDP flow and echo request that comes out of it, whatever the destination.
type netstack struct {
	cfg     netstackConfig
	carrier atomic.Pointer[carrier] // nil: it does not run
}

// netstackStats is what a netstack has to do at the moment, and what it could not do since run began.
type netstackStats struct {
	Conns   int // TCP connections that stand
	Pending int // that are being made

	Refused uint64 // connections beyond the limits, reset
	Ignored uint64 // SYNs beyond the limit of connections that are being made
	Foreign uint64 // packets from the TUN that netstack has no use for
	Lost    uint64 // packets that the TUN did not take
	UDP     udpCounters
	Cut     uint64 // packets that were to be cut by the kernel, and were cut here because it would not
}

// stats may be called at any time. It is zero unless run runs.
func (s *netstack) stats() netstackStats {
	c := s.carrier.Load()
	if c == nil {
		return netstackStats{}
	}
	return c.stats()
}

func newNetstack(cfg netstackConfig) (*netstack, error) {
	if cfg.MTU < header.IPv6MinimumMTU || cfg.MTU > gsoMaxSize {
		return nil, fmt.Errorf("netstack: MTU %d is not between %d and %d", cfg.MTU, header.IPv6MinimumMTU, gsoMaxSize)
	}
	if cfg.Resolve == nil || cfg.Log == nil {
		return nil, errors.New("netstack: no resolver or no logger")
	}
	return &netstack{cfg: cfg}, nil
}

// run carries the packets of tun until ctx is done, and then returns nil with everything it started gone; connections
// are reset. It may be run again. tun must be non-blocking, opened with IFF_TUN, IFF_NO_PI and IFF_VNET_HDR; it is not
// closed.
func (s *netstack) run(ctx context.Context, tun *os.File) error {
	raw, err := tun.SyscallConn()
	if err != nil {
		return fmt.Errorf("tun: %w", err)
	}
	if err := tun.SetDeadline(time.Time{}); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		return fmt.Errorf("tun: %w", err)
	}
	c, err := newCarrier(raw, s.cfg)
	if err != nil {
		return err
	}
	s.carrier.Store(c)
	defer s.carrier.Store(nil)
	stop := context.AfterFunc(ctx, c.poller.stop)
	err = c.link.receive()
	stop()
	// The resets of what is closed now should still get out, but not wait for long.
	tun.SetWriteDeadline(time.Now().Add(time.Second))
	c.close()
	tun.SetDeadline(time.Time{})
	s.cfg.Log.Debug("netstack stopped", "stats", c.stats())
	return err
}

// carrier is one run of a netstack.
type carrier struct {
	link   *link
	stack  *stack.Stack
	relays *tcprelay.Relays
	flows  *udpFlows
	echoes *echoRelay
	poller *poller

	handshakes sync.WaitGroup // who sends the link's
}

func newCarrier(raw syscall.RawConn, cfg netstackConfig) (*carrier, error) {
	link := newLink(raw, cfg)
	st, err := newStack(link)
	if err != nil {
		return nil, err
	}
	p, err := newPoller()
	if err != nil {
		st.Close()
		st.Wait()
		return nil, fmt.Errorf("netstack: %w", err)
	}
	x := &exit{cfg: cfg, stack: st, link: link, poller: p}
	c := &carrier{link: link, stack: st, relays: newRelays(st, cfg), flows: newUDPFlows(x), echoes: newEchoRelay(x), poller: p}
	link.poller = p
	link.early = append(link.early, c.flows.take, c.echoes.take)
	if cfg.Fast != nil {
		link.early = append(link.early, func(f *frame) bool { return cfg.Fast.take(f, link.inject) })
	}
	link.early = append(link.early, c.opens)
	st.SetTransportProtocolHandler(tcp.ProtocolNumber, c.relays.HandlePacket)
	st.SetTransportProtocolHandler(udp.ProtocolNumber, c.flows.handle)
	st.SetTransportProtocolHandler(icmp.ProtocolNumber4, c.echoes.handle)
	st.SetTransportProtocolHandler(icmp.ProtocolNumber6, c.echoes.handle)
	c.handshakes.Go(func() { link.handshakes.Send(link.closed, link.send) })
	return c, nil
}

// opens shows SYNs to the relays, and takes no frame.
func (c *carrier) opens(f *frame) bool {
	if s, ok := parseSYN(f); ok {
		c.relays.Opens(s.client, s.destination)
	}
	return false
}

func newRelays(st *stack.Stack, cfg netstackConfig) *tcprelay.Relays {
	return tcprelay.New(st, tcprelay.Config{NIC: nicID, Resolve: cfg.Resolve, Limits: cfg.TCP, Log: cfg.Log})
}

func (c *carrier) stats() netstackStats {
	var st netstackStats
	tcp := c.relays.Stats()
	st.Conns, st.Pending, st.Refused, st.Ignored = tcp.Conns, tcp.Pending, tcp.Refused, tcp.Ignored
	st.Foreign, st.Lost, st.Cut = c.link.refused.Load(), c.link.lost.Load(), c.link.cut.Load()
	st.UDP = c.flows.counters()
	return st
}

// close ends everything and returns when it has ended. Nothing must be received any more.
func (c *carrier) close() {
	c.relays.Close() // before the stack, which takes the memory of segments back
	c.flows.close()
	c.echoes.close()
	c.poller.close()
	c.stack.Close()
	c.relays.Wait()
	c.stack.Wait()
	close(c.link.closed)
	c.handshakes.Wait()
}

// newStack makes a netstack that takes every packet for its own, and has no address. It starts goroutines; Close and Wait end them.
func newStack(link *link) (*stack.Stack, error) {
	st, err := tcprelay.NewStack(nicID, link)
	if err != nil {
		return nil, err
	}
	st.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return st, nil
}

// toAddr is a as a netip.Addr.
func toAddr(a tcpip.Address) netip.Addr {
	if a.Len() == header.IPv4AddressSize {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16())
}

// protocolOf is the network protocol that a belongs to.
func protocolOf(a tcpip.Address) tcpip.NetworkProtocolNumber {
	if a.Len() == header.IPv4AddressSize {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
