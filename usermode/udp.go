package usermode

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

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

	// Each flow has a socket of the host. Beyond a limit, a flow that has been idle for long makes room.
	maxFlows       = 8192
	maxClientFlows = 2048

	// How many flows are compared to find one that has been idle for long: looking at all of them would let a
	// container that opens thousands in a second stall the others.
	evictionSample = 32

	flowBuffer = 1 << 20 // bytes that may wait in a flow's socket for us

	// While containers send without a pause, the sockets are served after so many packets of theirs.
	framesPerGlance = 64
)

// udpFlows carries UDP on: every pair of a container's port and a destination is a flow, with a connected socket of
// the host. Datagrams are taken from the TUN before netstack sees them, and answers written to it without netstack; it
// puts fragments together and cuts long answers. Everything here belongs to the goroutine that receives from the TUN.
type udpFlows struct {
	*exit
	// The limits, and idle times, of above.
	total, each           int
	idle, idleDNS, oneWay time.Duration

	flows   map[flowKey]*udpFlow
	list    []*udpFlow // all flows, in no order
	clients map[netip.Addr]*udpClient
	frames  int // since the last glance at the sockets
	burst   burst
	busy    bool // there was a datagram since the last pause

	open                      atomic.Int64 // flows
	evicted, refused, dropped atomic.Uint64
}

// flowKey is a container's port and the destination that it dialled.
type flowKey struct{ client, dst netip.AddrPort }

// udpClient is a container that has flows.
type udpClient struct {
	flows []*udpFlow // in no order
}

func newUDPFlows(x *exit) *udpFlows {
	t := &udpFlows{
		exit:    x,
		total:   maxFlows,
		each:    maxClientFlows,
		idle:    udpIdle,
		idleDNS: dnsIdle,
		oneWay:  oneWayIdle,
		flows:   make(map[flowKey]*udpFlow),
		clients: make(map[netip.Addr]*udpClient),
	}
	x.poller.due = t.expire
	x.poller.idle = t.pause
	return t
}

// udpCounters are for people who wonder where datagrams stay.
type udpCounters struct {
	Flows      int64  // now
	Evicted    uint64 // flows that made room for others
	Refused    uint64 // flows that could not be opened
	Dropped    uint64 // datagrams from containers: broken, or not taken by the host's socket
	Lost       uint64 // packets to containers that the TUN did not take
	Errors     uint64 // ICMP errors to containers
	ErrorsHeld uint64 // those that were one too many
}

// counters may be called by anyone.
func (t *udpFlows) counters() udpCounters {
	return udpCounters{
		Flows: t.open.Load(), Evicted: t.evicted.Load(), Refused: t.refused.Load(), Dropped: t.dropped.Load(),
		Lost: t.lost.Load(), Errors: t.errors.Sent.Load(), ErrorsHeld: t.errors.Held.Load(),
	}
}

// close ends all flows.
func (t *udpFlows) close() {
	for len(t.list) > 0 {
		t.end(t.list[0])
	}
}

// take takes a frame from the TUN if it is a datagram that needs nothing of netstack.
func (t *udpFlows) take(f *frame) bool {
	if t.frames++; t.frames >= framesPerGlance {
		t.frames = 0
		t.poller.glance()
	}
	var d datagram
	switch d.decodeUDP(f) {
	case good:
		t.forward(&d)
	case broken:
		t.dropped.Add(1)
	default:
		return false
	}
	return true
}

// handle takes a datagram that netstack has put together from fragments.
func (t *udpFlows) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	hdr := header.UDP(pkt.TransportHeader().Slice())
	size := pkt.Data().Size()
	lengthOK, sumOK := header.UDPValid(hdr, pkt.Data().Checksum, uint16(size), pkt.NetworkProtocolNumber,
		id.RemoteAddress, id.LocalAddress, pkt.RXChecksumValidated)
	if !lengthOK || !sumOK || id.LocalPort == 0 || id.RemotePort == 0 {
		t.dropped.Add(1)
		return true
	}
	payload, ok := pkt.Data().PullUp(int(hdr.Length()) - udpHdrLen)
	if !ok {
		return true
	}
	d := datagram{
		client:  netip.AddrPortFrom(toAddr(id.RemoteAddress), id.RemotePort),
		dst:     netip.AddrPortFrom(toAddr(id.LocalAddress), id.LocalPort),
		hops:    hopsOf(pkt),
		header:  append(append([]byte(nil), pkt.NetworkHeader().Slice()...), hdr...),
		payload: [2][]byte{payload, nil},
	}
	t.forward(&d)
	return true
}

// hopsOf is the TTL or hop limit of a packet.
func hopsOf(pkt *stack.PacketBuffer) uint8 {
	if pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber {
		return header.IPv4(pkt.NetworkHeader().Slice()).TTL()
	}
	return header.IPv6(pkt.NetworkHeader().Slice()).HopLimit()
}

// forward sends a datagram on its flow, which it makes if need be.
func (t *udpFlows) forward(d *datagram) {
	key := flowKey{d.client, d.dst}
	f := t.flows[key]
	if f == nil {
		if f = t.admit(key, d); f == nil {
			return
		}
	}
	f.last = time.Now()
	if t.burst.add(f, d) {
		return
	}
	t.burst.flush()
	// Only what has company waits for more.
	if !t.busy || !t.burst.add(f, d) {
		f.send(d)
	}
	t.busy = true
}

// pause is called when the TUN has nothing more to read for now.
func (t *udpFlows) pause() {
	t.burst.flush()
	t.busy = false
}

// admit opens a flow for d. When that cannot be, it tells the container why and returns nil.
func (t *udpFlows) admit(key flowKey, d *datagram) *udpFlow {
	v4 := key.dst.Addr().Is4()
	host, ok := t.cfg.Resolve(key.dst.Addr())
	if !ok {
		t.refused.Add(1)
		t.reject(icmperror.Prohibited(v4), d)
		return nil
	}
	f, err := t.dial(key, netip.AddrPortFrom(host, key.dst.Port()))
	if err != nil {
		t.refused.Add(1)
		t.cfg.Log.Debug("open a UDP flow", "client", key.client.Addr(), "err", err)
		// That we have no descriptors or memory left is no answer. "No route" is, but a program whose socket is
		// connected would not be told: the kernel takes it for something that may pass.
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EINVAL) {
			t.reject(icmperror.PortUnreachable(v4), d)
		}
		return nil
	}
	t.add(f)
	return f
}

// reject answers a datagram with an ICMP error.
func (t *udpFlows) reject(e icmperror.Message, d *datagram) {
	t.report(e, d.client.Addr(), d.dst.Addr(), d.header, d.payload[0])
}

// add puts f into the table and makes room for it if need be.
func (t *udpFlows) add(f *udpFlow) {
	addr := f.key.client.Addr()
	c := t.clients[addr]
	if c == nil {
		c = &udpClient{}
		t.clients[addr] = c
	}
	if len(c.flows) >= t.each {
		t.evict(c)
	} else if len(t.list) >= t.total {
		t.evict(t.greediest())
	}
	f.client = c
	f.inClient, c.flows = len(c.flows), append(c.flows, f)
	f.inList, t.list = len(t.list), append(t.list, f)
	t.flows[f.key] = f
	t.clients[addr] = c // it may have gone when its only flow made room
	t.open.Add(1)
}

// greediest is the client with the most flows, or nearly: of some flows, the owner that has the most.
func (t *udpFlows) greediest() *udpClient {
	var most *udpClient
	for range evictionSample {
		if c := t.list[rand.IntN(len(t.list))].client; most == nil || len(c.flows) > len(most.flows) {
			most = c
		}
	}
	return most
}

// evict ends a flow of c that has been idle for long: of some, the one that was for longest.
func (t *udpFlows) evict(c *udpClient) {
	var oldest *udpFlow
	for i := range min(evictionSample, len(c.flows)) {
		if len(c.flows) > evictionSample {
			i = rand.IntN(len(c.flows))
		}
		if f := c.flows[i]; oldest == nil || f.last.Before(oldest.last) {
			oldest = f
		}
	}
	t.evicted.Add(1)
	t.end(oldest)
}

// end closes a flow and forgets it.
func (t *udpFlows) end(f *udpFlow) {
	if t.burst.flow == f {
		t.burst.flush()
	}
	unix.Close(f.fd)
	t.poller.remove(f.place)
	delete(t.flows, f.key)
	last := t.list[len(t.list)-1]
	t.list[f.inList], last.inList = last, f.inList
	t.list = t.list[:len(t.list)-1]
	c := f.client
	last = c.flows[len(c.flows)-1]
	c.flows[f.inClient], last.inClient = last, f.inClient
	if c.flows = c.flows[:len(c.flows)-1]; len(c.flows) == 0 {
		delete(t.clients, f.key.client.Addr())
	}
	t.open.Add(-1)
}

// expire ends the flows that have been idle for long enough, and returns when to look again.
func (t *udpFlows) expire(now time.Time) time.Duration {
	next := never
	for i := len(t.list) - 1; i >= 0; i-- { // end puts the last in the place of the one that goes
		f := t.list[i]
		left := t.patience(f) - now.Sub(f.last)
		if left <= 0 {
			t.end(f)
			continue
		}
		next = min(next, left)
	}
	// Not for each of thousands by itself.
	return max(next, min(t.idle, t.idleDNS)/20)
}

// patience is how long f may be idle.
func (t *udpFlows) patience(f *udpFlow) time.Duration {
	patience := t.idle
	if f.key.dst.Port() == dnsPort {
		patience = t.idleDNS
	}
	if !f.answered {
		patience = min(patience, t.oneWay)
	}
	return patience
}

// deliverCut sends a datagram that is longer than the MTU to a container, in fragments, which netstack makes.
func (t *udpFlows) deliverCut(f *udpFlow, payload []byte) {
	src, dst := tcpip.AddrFromSlice(f.key.dst.Addr().AsSlice()), tcpip.AddrFromSlice(f.key.client.Addr().AsSlice())
	route, err := t.stack.FindRoute(nicID, src, dst, protocolOf(dst), false)
	if err != nil {
		t.lost.Add(1)
		return
	}
	defer route.Release()
	v := buffer.NewView(len(payload))
	v.Write(payload)
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: udpHdrLen + int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithView(v),
	})
	defer pkt.DecRef()
	hdr := header.UDP(pkt.TransportHeader().Push(udpHdrLen))
	pkt.TransportProtocolNumber = udp.ProtocolNumber
	length := uint16(pkt.Size())
	hdr.Encode(&header.UDPFields{SrcPort: f.key.dst.Port(), DstPort: f.key.client.Port(), Length: length})
	sum := checksum.Combine(route.PseudoHeaderChecksum(udp.ProtocolNumber, length), pkt.Data().Checksum())
	if sum = ^hdr.CalculateChecksum(sum); sum == 0 {
		sum = 0xffff // zero says that there is none (RFC 768)
	}
	hdr.SetChecksum(sum)
	route.WritePacket(stack.NetworkHeaderParams{Protocol: udp.ProtocolNumber, TTL: hopsOut}, pkt)
}
