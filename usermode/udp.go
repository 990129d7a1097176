package usermode

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const (
	// How long a flow is kept without a datagram. RFC 4787 asks for two minutes and allows less for ports that are
	// known to need less; 90 s is what most applications send keep-alives for.
	udpIdle = 90 * time.Second
	dnsIdle = 20 * time.Second
	dnsPort = 53

	// Each flow has a socket of the host. Beyond a limit, the flow that has been idle for longest makes room.
	maxFlows       = 8192
	maxClientFlows = 2048

	maxDatagram = 65535
)

// udpFlows carries UDP on: every pair of a container's port and a destination is a flow, with a connected socket of
// the host. netstack checks and reassembles the packets and cuts the answers into fragments; its UDP is not used.
type udpFlows struct {
	cfg   netstackConfig
	stack *stack.Stack
	// The limits, and idle times, of above.
	total, each   int
	idle, idleDNS time.Duration

	joined sync.WaitGroup
	mu     sync.Mutex
	closed bool
	flows  map[stack.TransportEndpointID]*udpFlow
	// Each client's flows (*udpFlow), the one that sent last in front.
	clients map[tcpip.Address]*list.List
}

// udpFlow is one flow.
type udpFlow struct {
	table *udpFlows
	id    stack.TransportEndpointID // Local is the destination, Remote the container
	conn  *net.UDPConn
	raw   syscall.RawConn
	route *stack.Route
	idle  time.Duration
	last  atomic.Int64  // when something was sent or received, UnixNano
	place *list.Element // in clients

	out     []byte // what sendFn sends
	sendErr error
	sendFn  func(fd uintptr) bool
}

func newUDPFlows(st *stack.Stack, cfg netstackConfig) *udpFlows {
	return &udpFlows{
		cfg:     cfg,
		stack:   st,
		total:   maxFlows,
		each:    maxClientFlows,
		idle:    udpIdle,
		idleDNS: dnsIdle,
		flows:   make(map[stack.TransportEndpointID]*udpFlow),
		clients: make(map[tcpip.Address]*list.List),
	}
}

// close ends all flows and returns when they have.
func (t *udpFlows) close() {
	t.mu.Lock()
	t.closed = true
	for _, f := range t.flows {
		f.conn.Close()
	}
	t.mu.Unlock()
	t.joined.Wait()
}

// handle takes a datagram from a container. False makes netstack answer that the port is unreachable. It is called by
// the TUN's reader and does not wait for anything.
func (t *udpFlows) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	hdr := header.UDP(pkt.TransportHeader().Slice())
	size := pkt.Data().Size()
	lengthOK, sumOK := header.UDPValid(hdr, pkt.Data().Checksum, uint16(size), pkt.NetworkProtocolNumber,
		id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated)
	if !lengthOK || !sumOK || id.LocalPort == 0 || id.RemotePort == 0 {
		return true
	}
	f, ok := t.flow(id)
	if f == nil {
		return ok
	}
	payload, ok := pkt.Data().PullUp(int(hdr.Length()) - header.UDPMinimumSize)
	if ok {
		f.send(payload)
	}
	return true
}

// flow finds the flow of id or makes it. When there is none, ok tells whether the datagram is dropped silently.
func (t *udpFlows) flow(id stack.TransportEndpointID) (_ *udpFlow, ok bool) {
	t.mu.Lock()
	f := t.flows[id]
	if f != nil {
		t.clients[id.RemoteAddress].MoveToFront(f.place)
	}
	closed := t.closed
	t.mu.Unlock()
	if f != nil || closed {
		return f, true
	}
	addr, ok := t.cfg.Resolve(toAddr(id.LocalAddress))
	if !ok {
		return nil, false
	}
	f, err := t.open(id, netip.AddrPortFrom(addr, id.LocalPort))
	if err != nil {
		t.cfg.Log.Debug("open a UDP flow", "client", toAddr(id.RemoteAddress), "err", err)
		// "No route" and the like are answers; that we have no descriptors left is not.
		return nil, errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE)
	}
	t.add(f)
	return f, true
}

// open makes a flow's socket.
func (t *udpFlows) open(id stack.TransportEndpointID, dst netip.AddrPort) (*udpFlow, error) {
	f := &udpFlow{table: t, id: id, idle: t.idle}
	if id.LocalPort == dnsPort {
		f.idle = t.idleDNS
	}
	var err error
	dialer := net.Dialer{Control: noBroadcast}
	if f.conn, err = dialer.DialUDP(context.Background(), "udp", netip.AddrPort{}, dst); err != nil {
		return nil, err
	}
	if f.raw, err = f.conn.SyscallConn(); err != nil {
		f.conn.Close()
		return nil, err
	}
	route, terr := t.stack.FindRoute(nicID, id.LocalAddress, id.RemoteAddress, protocolOf(id.LocalAddress), false)
	if terr != nil {
		f.conn.Close()
		return nil, fmt.Errorf("route: %s", terr)
	}
	f.route = route
	f.sendFn = f.write
	f.last.Store(time.Now().UnixNano())
	return f, nil
}

// noBroadcast takes back what package net allows every UDP socket: to connect to a broadcast address of the host's
// network, which is not the container's.
func noBroadcast(_, _ string, raw syscall.RawConn) error {
	var serr error
	err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0) })
	return errors.Join(err, os.NewSyscallError("setsockopt", serr))
}

// add puts f into the table, makes room for it if need be, and starts its receiver.
func (t *udpFlows) add(f *udpFlow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	mine := t.clients[f.id.RemoteAddress]
	if mine == nil {
		mine = list.New()
		t.clients[f.id.RemoteAddress] = mine
	}
	if mine.Len() >= t.each {
		t.evictLocked(mine)
	} else if len(t.flows) >= t.total {
		t.evictLocked(t.largestLocked())
	}
	f.place = mine.PushFront(f)
	t.flows[f.id] = f
	t.joined.Go(f.receive)
}

// largestLocked is the list of the client with the most flows.
func (t *udpFlows) largestLocked() *list.List {
	var most *list.List
	for _, l := range t.clients {
		if most == nil || l.Len() > most.Len() {
			most = l
		}
	}
	return most
}

// evictLocked ends the flow of flows that has not sent for longest.
func (t *udpFlows) evictLocked(flows *list.List) {
	f := flows.Back().Value.(*udpFlow)
	t.removeLocked(f)
	f.conn.Close() // its receiver ends
}

func (t *udpFlows) removeLocked(f *udpFlow) {
	if t.flows[f.id] != f {
		return
	}
	delete(t.flows, f.id)
	mine := t.clients[f.id.RemoteAddress]
	mine.Remove(f.place)
	if mine.Len() == 0 {
		delete(t.clients, f.id.RemoteAddress)
	}
}

// send sends a datagram to the host's side. It does not wait: a full socket buffer loses datagrams, as a full queue
// does on any path.
func (f *udpFlow) send(b []byte) {
	f.last.Store(time.Now().UnixNano())
	f.out = b
	for range 2 {
		if f.raw.Write(f.sendFn) != nil || f.sendErr == nil {
			break
		}
		// The error belongs to an earlier datagram, and this one has not been sent.
		if f.sendErr != unix.ECONNREFUSED {
			break
		}
		f.refuse()
	}
	f.out = nil
}

func (f *udpFlow) write(fd uintptr) bool {
	_, f.sendErr = ignoringEINTR(func() (int, error) { return unix.Write(int(fd), f.out) })
	return true
}

var datagrams = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// receive carries what the host's side sends to the container, until the flow is idle or closed.
func (f *udpFlow) receive() {
	defer f.end()
	var rerr error
	take := func(fd uintptr) bool {
		b := datagrams.Get().(*[maxDatagram]byte) // not held while waiting
		defer datagrams.Put(b)
		var n int
		n, rerr = ignoringEINTR(func() (int, error) { return unix.Read(int(fd), b[:]) })
		if rerr == nil {
			f.last.Store(time.Now().UnixNano())
			f.deliver(b[:n])
		}
		return rerr != unix.EAGAIN
	}
	f.conn.SetReadDeadline(time.Now().Add(f.idle))
	for {
		err := f.raw.Read(take)
		switch {
		case err == nil && rerr == nil:
		case err == nil && rerr == unix.ECONNREFUSED:
			f.refuse()
		case err == nil:
			return
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return
		default:
			until := time.Unix(0, f.last.Load()).Add(f.idle)
			if !time.Now().Before(until) {
				return
			}
			f.conn.SetReadDeadline(until)
		}
	}
}

// end takes the flow out of the table and closes it.
func (f *udpFlow) end() {
	f.table.mu.Lock()
	f.table.removeLocked(f)
	f.table.mu.Unlock()
	f.conn.Close()
	f.route.Release()
}

// deliver sends a datagram to the container.
func (f *udpFlow) deliver(payload []byte) {
	v := buffer.NewView(len(payload))
	v.Write(payload)
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.UDPMinimumSize + int(f.route.MaxHeaderLength()),
		Payload:            buffer.MakeWithView(v),
	})
	defer pkt.DecRef()
	hdr := header.UDP(pkt.TransportHeader().Push(header.UDPMinimumSize))
	pkt.TransportProtocolNumber = udp.ProtocolNumber
	length := uint16(pkt.Size())
	hdr.Encode(&header.UDPFields{SrcPort: f.id.LocalPort, DstPort: f.id.RemotePort, Length: length})
	sum := checksum.Combine(f.route.PseudoHeaderChecksum(udp.ProtocolNumber, length), pkt.Data().Checksum())
	if sum = ^hdr.CalculateChecksum(sum); sum == 0 {
		sum = 0xffff // zero says that there is none (RFC 768)
	}
	hdr.SetChecksum(sum)
	f.route.WritePacket(stack.NetworkHeaderParams{Protocol: udp.ProtocolNumber, TTL: f.route.DefaultTTL()}, pkt)
}

// refuse tells the container that the port is unreachable, as the host was told.
func (f *udpFlow) refuse() {
	quote := make([]byte, header.UDPMinimumSize)
	header.UDP(quote).Encode(&header.UDPFields{SrcPort: f.id.RemotePort, DstPort: f.id.LocalPort, Length: header.UDPMinimumSize})
	sendPortUnreachable(f.route, quote)
}
