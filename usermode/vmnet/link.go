package vmnet

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// maxPacket is the longest IP packet.
const maxPacket = 65535

// link is the switch's gateway port as a netstack link endpoint. Packets are sent by whoever has one, up to 64 KiB of TCP in one and
// with the checksum left out: the switch sends them so to machines that take it, and finishes them for the others.
type link struct {
	sw         *l2.Switch
	mac        l2.MAC
	gateway    [4]byte // its address
	gateway6   tcpip.Address
	mtu        atomic.Uint32
	dispatcher atomic.Pointer[stack.NetworkDispatcher]
	lost       atomic.Uint64 // packets for which there was no room

	outboxes   atomic.Pointer[map[l2.MAC]*outbox] // of machines that are behind; never changed, but replaced
	handshakes tcprelay.Handshakes

	done  chan struct{} // ends the outboxes, and who sends handshakes
	mu    sync.Mutex    // for a change of outboxes
	ended bool
	wg    sync.WaitGroup
}

var (
	_ tcprelay.Link     = (*link)(nil)
	_ stack.GSOEndpoint = (*link)(nil)
)

func newLink(sw *l2.Switch, cfg Config) *link {
	l := &link{sw: sw, mac: cfg.MAC, gateway: cfg.Gateway.As4(), handshakes: tcprelay.NewHandshakes(), done: make(chan struct{})}
	if cfg.Gateway6.IsValid() {
		l.gateway6 = tcpip.AddrFrom16(cfg.Gateway6.As16())
	}
	l.mtu.Store(uint32(cfg.MTU))
	l.outboxes.Store(&map[l2.MAC]*outbox{})
	return l
}

// close ends the outboxes. netstack must have ended.
func (l *link) close() {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	close(l.done)
	l.wg.Wait()
}

// deliver gives a packet to netstack.
func (l *link) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if d := l.dispatcher.Load(); d != nil {
		(*d).DeliverNetworkPacket(proto, pkt)
	}
	pkt.DecRef()
}

// WritePacket sends pkt: to the machine's port if there is room and nothing waits in its outbox, else by the outbox. It does not wait:
// it is called by goroutines that serve everybody, those of netstack's TCP among them.
func (l *link) WritePacket(pkt *stack.PacketBuffer) tcpip.Error {
	mac, ok := destination(pkt)
	if !ok {
		l.lost.Add(1)
		return nil
	}
	switch pkt.NetworkProtocolNumber {
	case header.ARPProtocolNumber:
		l.askAsGateway(pkt)
	case header.IPv6ProtocolNumber:
		l.askAsGateway6(pkt)
	}
	if box := (*l.outboxes.Load())[mac]; box != nil && box.put(pkt) {
		return nil
	}
	if !l.handshakes.Take(pkt) {
		l.send(mac, pkt)
	}
	return nil
}

// send sends pkt, or leaves it to the machine's outbox.
func (l *link) send(mac l2.MAC, pkt *stack.PacketBuffer) {
	s := senders.Get().(*sender)
	full := s.send(l.sw, pkt)
	s.release()
	if full == 0 {
		return
	}
	if mac[0]&1 != 0 || !l.postpone(mac, pkt) {
		l.lost.Add(1)
	}
}

// sendHandshake sends a SYN-ACK that has waited.
func (l *link) sendHandshake(pkt *stack.PacketBuffer) {
	if mac, ok := destination(pkt); ok {
		l.send(mac, pkt)
	}
}

// askAsGateway has netstack ask for a machine's address in the gateway's name. It does so in that of whoever is to be its peer, of
// whom the machine would then remember a wrong thing.
func (l *link) askAsGateway(pkt *stack.PacketBuffer) {
	h := header.ARP(pkt.NetworkHeader().Slice())
	if h.IsValid() && h.Op() == header.ARPRequest {
		copy(h.ProtocolAddressSender(), l.gateway[:])
	}
}

// askAsGateway6 is askAsGateway for a neighbour solicitation, whose source must be on the link (RFC 4861, 7.2.2).
func (l *link) askAsGateway6(pkt *stack.PacketBuffer) {
	ip := header.IPv6(pkt.NetworkHeader().Slice())
	if len(ip) != header.IPv6MinimumSize || ip.NextHeader() != uint8(header.ICMPv6ProtocolNumber) || pkt.Data().Size() > maxSolicitation {
		return
	}
	body, ok := pkt.Data().PullUp(pkt.Data().Size())
	icmp := header.ICMPv6(body)
	if !ok || len(icmp) < header.ICMPv6NeighborSolicitMinimumSize || icmp.Type() != header.ICMPv6NeighborSolicit {
		return
	}
	if src := ip.SourceAddress(); src == l.gateway6 || src == header.IPv6Any || header.IsV6LinkLocalUnicastAddress(src) {
		return
	}
	ip.SetSourceAddress(l.gateway6)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: l.gateway6, Dst: ip.DestinationAddress()}))
}

// maxSolicitation is longer than any neighbour solicitation of netstack's.
const maxSolicitation = 64

// WritePackets is WritePacket for each of pkts.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		l.WritePacket(pkt)
	}
	return pkts.Len(), nil
}

// destination reads the link header of a packet.
func destination(pkt *stack.PacketBuffer) (l2.MAC, bool) {
	eth := pkt.LinkHeader().Slice()
	if len(eth) < header.EthernetMinimumSize {
		return l2.MAC{}, false
	}
	return l2.MAC(eth[:6]), true
}

// sender holds what the switch is shown of one packet.
type sender struct {
	frames [1]l2.Frame
	tail   [][]byte
}

var senders = sync.Pool{New: func() any { return new(sender) }}

func (s *sender) release() {
	s.frames[0] = l2.Frame{}
	clear(s.tail) // the pool must not keep the packets' memory
	senders.Put(s)
}

// send sends pkt, or returns 1 if its port had no room.
func (s *sender) send(sw *l2.Switch, pkt *stack.PacketBuffer) (full int) {
	f := &s.frames[0]
	f.Virtio = virtioFor(pkt)
	f.Head, s.tail = nil, s.tail[:0]
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		if b = b[skip:]; f.Head == nil {
			f.Head = b // all headers: they are pushed in front of each other
		} else {
			s.tail = append(s.tail, b)
		}
		skip = 0
	}
	f.Tail = s.tail
	return sw.Send(s.frames[:])
}

// virtioFor says what netstack left undone in pkt: the checksum, and the cut into segments.
func virtioFor(pkt *stack.PacketBuffer) l2.Virtio {
	gso := pkt.GSOOptions
	if !gso.NeedsCsum {
		return l2.Virtio{}
	}
	v := l2.Virtio{Flags: l2.NeedsCsum, CsumStart: header.EthernetMinimumSize + gso.L3HdrLen, CsumOffset: gso.CsumOffset}
	if gso.MSS == 0 || pkt.Data().Size() <= int(gso.MSS) {
		return v
	}
	switch gso.Type {
	case stack.GSOTCPv4:
		v.GSOType = l2.GSOTCPv4
	case stack.GSOTCPv6:
		v.GSOType = l2.GSOTCPv6
	default:
		return v
	}
	v.HdrLen, v.GSOSize = uint16(pkt.HeaderSize()), gso.MSS
	return v
}

// AddHeader gives pkt its Ethernet header.
func (l *link) AddHeader(pkt *stack.PacketBuffer) {
	header.Ethernet(pkt.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: l.LinkAddress(), DstAddr: pkt.EgressRoute.RemoteLinkAddress, Type: pkt.NetworkProtocolNumber,
	})
}

// Capabilities promises that what is delivered needs no checksum verified: Deliver has, where nobody else had. It does not promise
// checksums on the way out, though the switch would make them: netstack then leaves them out of SYN and RST segments as well, which
// carry no GSOOptions that would tell so.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload | stack.CapabilityResolutionRequired
}

// GSOMaxSize, with SupportedGSO, lets netstack hand over TCP in packets of up to 64 KiB.
func (l *link) GSOMaxSize() uint32                      { return maxPacket }
func (l *link) SupportedGSO() stack.SupportedGSO        { return stack.HostGSOSupported }
func (l *link) MTU() uint32                             { return l.mtu.Load() }
func (l *link) SetMTU(mtu uint32)                       { l.mtu.Store(mtu) }
func (l *link) MaxHeaderLength() uint16                 { return header.EthernetMinimumSize }
func (l *link) LinkAddress() tcpip.LinkAddress          { return tcpip.LinkAddress(l.mac[:]) }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Wait()                                   {} // close does
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
func (l *link) IsAttached() bool                        { return l.dispatcher.Load() != nil }

// Attach is called with the stack's NIC, and with nil when it goes.
func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}
