// Package vmnet is the gateway of a network of virtual machines, on any system: it answers at the network's own addresses, gives
// machines theirs, and carries what they send to the world on by ordinary sockets of this process. Frames come from and
// go to the ports of a Switch. It does not listen on the host, does not answer names, and does not know hypervisors.
//
//	machine ── port ── Switch ──┬─ other machines
//	                            └─ Deliver: whose frame is it, and what is it?
//	                                 TCP, ARP, neighbours, what is for the gateway ──► netstack ── package tcprelay ── the host's sockets
//	                                 UDP, echo requests ────────────────────────────► package flows ── the host's sockets
//	                                 DHCP, router solicitations ────────────────────► package dhcp
//
// Each port's goroutine delivers its machine's frames, and nothing it does waits for another machine. What netstack sends goes to the
// machine's port at once if there is room, and else by way of an outbox of that machine, which waits for it alone.
package vmnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/usermode/dhcp"
	"github.com/usernet/usernet/usermode/flows"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// Config is what a Network is made of.
type Config struct {
	MTU        int                       // bytes of an IP packet, 1280 to 65535
	MAC        l2.MAC                    // the gateway's
	Subnet     netip.Prefix              // IPv4
	Gateway    netip.Addr                // the gateway's address in Subnet
	Subnet6    netip.Prefix              // of 64 bits; zero: no IPv6
	Gateway6   netip.Addr                // the gateway's address in Subnet6
	VirtualIPs []netip.Addr              // further addresses in the subnets that are the gateway's
	NAT        map[netip.Addr]netip.Addr // what machines dial → what is dialled on the host for it; the former are the gateway's too
	LinkLocal  bool                      // machines may reach 169.254.0.0/16
	Isolated   bool                      // machines reach the gateway only, not each other
	Leases     map[netip.Addr]l2.MAC     // addresses of known machines
	Search     []string                  // domains in which machines look for names
	DNS        []netip.Addr              // name servers that machines are told; nil: the gateway
	TCP        tcprelay.Limits           // of each machine and all of them; zero: the usual
	Log        *slog.Logger              // nil: nothing is logged
}

// Network is a network of virtual machines. Its methods may be called from several goroutines.
type Network struct {
	cfg       Config
	addresses addresses
	sw        *l2.Switch
	link      *link
	stack     *stack.Stack
	relays    *tcprelay.Relays
	inbound   *tcprelay.Quota // connections to machines that JoinTCP relays
	dialling  *tcprelay.Quota // those of them that are being made
	flows     *flows.Flows
	dhcp      *dhcp.Server
	router    *dhcp.Router // nil: no IPv6
	stations  stations
	sockets   udpTable
	guests    sync.Map // *l2.Port → *guest
	started   time.Time

	foreign    atomic.Uint64
	spoofed    atomic.Uint64
	turnedAway atomic.Uint64 // connections to the gateway's own ports

	closed atomic.Bool   // nothing is delivered any more
	done   chan struct{} // closed with it
	end    sync.Once
	mu     sync.Mutex
	ending bool           // no new ends
	ends   map[ender]bool // what is open and ends with the network
	joins  sync.WaitGroup // JoinTCP
}

// ender is something that ends with the network.
type ender interface{ abort() }

// Stats is what a Network carries at the moment, and what it has turned away.
type Stats struct {
	Conns   int // TCP connections of machines to the world
	Pending int // TCP connections that are being made
	Inbound int // TCP connections to machines that JoinTCP relays

	Refused uint64           // TCP connections beyond a limit, reset
	Ignored uint64           // SYNs beyond the limit of connections that are being made; their senders repeat them
	Foreign uint64           // frames to the gateway that it has no use for
	Spoofed uint64           // frames from an IP address that is another machine's, or none of the network's
	Lost    uint64           // frames to machines that were too slow to take them
	Flows   flows.Stats      // UDP and echo requests
	Ports   map[int]l2.Stats // of the machines' ports, by ID
	Stack   any              // netstack's own counters, tcpip.Stats
}

// New checks cfg and makes the network, at which machines may be connected and ports be listened on from here on; Run or Close must
// follow.
func New(cfg Config) (*Network, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a, err := newAddresses(cfg)
	if err != nil {
		return nil, err
	}
	n := &Network{
		cfg: cfg, addresses: a, started: time.Now(), done: make(chan struct{}), ends: make(map[ender]bool),
		inbound:  tcprelay.NewQuota(tcprelay.MaxConns, tcprelay.MaxClientConns),
		dialling: tcprelay.NewQuota(tcprelay.MaxHandshakes, tcprelay.MaxClientHandshakes),
	}
	n.stations.init(n)
	n.sockets.init()
	if err := n.newServices(); err != nil {
		return nil, err
	}
	n.sw = l2.NewSwitch(l2.Config{GatewayMAC: cfg.MAC, Gateway: n, GatewayAddrs: a.list, Isolated: cfg.Isolated})
	n.link = newLink(n.sw, cfg)
	if n.stack, err = newStack(n.link, a); err != nil {
		return nil, err
	}
	n.link.wg.Go(func() { n.link.handshakes.Send(n.link.done, n.link.sendHandshake) })
	n.flows = flows.New(flows.Config{Resolve: n.addresses.resolve, SendUDP: n.sendUDP, SendICMP: n.sendICMP, Log: cfg.Log})
	n.relays = tcprelay.New(n.stack, tcprelay.Config{
		NIC: nicID, Resolve: n.addresses.resolve, Holder: n.stations.holder, Limits: cfg.TCP,
		SendBuffer: sendBuffer, ReceiveBuffer: receiveBuffer, Log: cfg.Log,
	})
	n.setHandlers()
	return n, nil
}

// Run carries traffic until ctx is done, and then returns nil with everything that it and New started gone; connections are reset.
// It is called once.
func (n *Network) Run(ctx context.Context) error {
	defer n.Close()
	running, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { n.advertise(running) })
	err := n.flows.Run(running)
	stop()
	if err != nil {
		return fmt.Errorf("flows: %w", err)
	}
	return nil
}

// Close ends a network that was never run. After Run it does nothing.
func (n *Network) Close() error {
	n.end.Do(func() {
		n.closed.Store(true)
		close(n.done)
		n.guests.Range(func(_, g any) bool { // those that were delivering have returned
			g.(*guest).await()
			return true
		})
		n.mu.Lock()
		n.ending = true
		ends := make([]ender, 0, len(n.ends))
		for e := range n.ends {
			ends = append(ends, e)
		}
		n.mu.Unlock()
		for _, e := range ends {
			e.abort()
		}
		n.relays.Close() // before the stack, which takes the memory of segments back
		n.joins.Wait()
		n.stack.Close()
		n.relays.Wait()
		n.stack.Wait()
		n.link.close()
	})
	return nil
}

// errClosed says that the network has ended.
var errClosed = errors.New("the network has ended")

// add lets e end with the network, unless that has ended.
func (n *Network) add(e ender) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ending {
		return errClosed
	}
	n.ends[e] = true
	return nil
}

func (n *Network) remove(e ender) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.ends, e)
}

// Switch is what the machines' ports are made on.
func (n *Network) Switch() *l2.Switch { return n.sw }

// Leases are the addresses that machines have been given, and those that are kept for them.
func (n *Network) Leases() []dhcp.Lease { return n.dhcp.Leases() }

// Stats may be called at any time.
func (n *Network) Stats() Stats {
	tcp := n.relays.Stats()
	inbound, _ := n.inbound.Counts()
	s := Stats{
		Conns: tcp.Conns, Pending: tcp.Pending, Refused: tcp.Refused + n.turnedAway.Load(), Ignored: tcp.Ignored, Inbound: inbound,
		Foreign: n.foreign.Load(), Spoofed: n.spoofed.Load(), Lost: n.link.lost.Load(),
		Flows: n.flows.Stats(), Ports: make(map[int]l2.Stats), Stack: n.stack.Stats(),
	}
	for _, p := range n.sw.Ports() {
		s.Ports[p.ID] = p.Stats()
	}
	return s
}

// now is a clock for what need not be exact.
func (n *Network) now() time.Duration { return time.Since(n.started) }
