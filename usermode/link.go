package usermode

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/nonblock"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// link is a TUN as a netstack link endpoint. Packets go through it whole in both directions, up to 64 KiB of TCP at a
// time, with their checksums and segmentation left to the kernel (gVisor's own fdbased does that for sockets only).
//
// Received packets are delivered inline by the goroutine that runs receive; packets are sent by whoever has one.
type link struct {
	raw     syscall.RawConn
	offload bool
	sources []netip.Prefix // none: any
	log     *slog.Logger

	// poller waits for packets, in place of the runtime's.
	poller *poller
	// early are asked in turn, before netstack, whether they take a packet. Set before receive.
	early []func(*frame) bool

	handshakes tcprelay.Handshakes
	closed     chan struct{}                                // ends who sends them
	writev     func(fd int, iovs []unix.Iovec) (int, error) // nonblock.Writev

	mtu        atomic.Uint32
	dispatcher atomic.Pointer[stack.NetworkDispatcher]
	plain      atomic.Bool // the kernel has refused to cut a packet: we do it

	refused atomic.Uint64 // received frames that were not for netstack
	lost    atomic.Uint64 // packets that the TUN did not take
	cut     atomic.Uint64 // packets that we cut because the TUN would not
}

var (
	_ tcprelay.Link     = (*link)(nil)
	_ stack.GSOEndpoint = (*link)(nil) // a wrapper around link must pass this on, or segmentation is off
)

func newLink(raw syscall.RawConn, cfg netstackConfig) *link {
	l := &link{
		raw: raw, offload: cfg.Offload, sources: cfg.Sources, log: cfg.Log,
		handshakes: tcprelay.NewHandshakes(), closed: make(chan struct{}), writev: nonblock.Writev,
	}
	l.mtu.Store(uint32(cfg.MTU))
	return l
}

// receive delivers what the TUN has, until its poller is stopped.
func (l *link) receive() error {
	rx := newReceiver(l.poller)
	defer rx.release()
	for {
		err := l.raw.Read(rx.readFn)
		if err == nil {
			err = rx.err
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tun: %w", err)
		}
		l.deliver(rx)
	}
}

// frame is a packet that came from the TUN. It belongs to the receiver, which reads the next one into the same memory.
type frame struct {
	virtio virtioHdr
	proto  tcpip.NetworkProtocolNumber
	// The packet, from its IP header on. The second part is empty unless the first is full (headSize).
	parts [2][]byte
}

// deliver hands the frame in rx to whoever takes it first, and that is netstack in the end.
func (l *link) deliver(rx *receiver) {
	d := l.dispatcher.Load()
	virtio, err := decodeVirtio(rx.hdr[:min(rx.n, virtioHdrLen)])
	proto, ok := classify(rx.start())
	if err != nil || !ok || d == nil || !l.takes(proto, rx.start()) {
		l.refused.Add(1)
		return
	}
	rx.frame.virtio, rx.frame.proto, rx.frame.parts = virtio, proto, [2][]byte{rx.start(), rx.rest()}
	for _, takes := range l.early {
		if takes(&rx.frame) {
			return
		}
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: rx.take()})
	(*d).DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

// takes tells whether the packet that begins with b, which classify has seen, comes from one of the sources.
func (l *link) takes(proto tcpip.NetworkProtocolNumber, b []byte) bool {
	if len(l.sources) == 0 {
		return true
	}
	var src netip.Addr
	if proto == header.IPv4ProtocolNumber {
		src = netip.AddrFrom4([4]byte(header.IPv4(b).SourceAddressSlice()))
	} else {
		src = netip.AddrFrom16([16]byte(header.IPv6(b).SourceAddressSlice()))
	}
	for _, p := range l.sources {
		if p.Contains(src) {
			return true
		}
	}
	return false
}

// The buffers that a frame is read into, one after the other. Chunks of gVisor's pool come in powers of two and are
// cleared each time they are taken.
const (
	headSize = 2048                // holds any frame of the usual MTU
	bodySize = buffer.MaxChunkSize // with headSize, any frame at all
	// Up to this length a packet is copied and its buffer kept: acknowledgements, DNS.
	smallPacket = 512
)

// receiver reads frames into buffers that it gives away when a packet fills them, and keeps when it does not: a 40
// byte acknowledgement neither pins nor clears 64 KiB.
type receiver struct {
	hdr        [virtioHdrLen]byte
	head, body *buffer.View
	iovs       [3]unix.Iovec // hdr, head, body
	n          int           // bytes in the frame, virtio header included
	err        error
	frame      frame // for those who look at it before netstack
	poller     *poller
	readFn     func(fd uintptr) bool // read; made once, since a method value is an allocation
}

func newReceiver(p *poller) *receiver {
	r := &receiver{poller: p, head: buffer.NewViewSize(headSize), body: buffer.NewViewSize(bodySize)}
	r.iovs = [...]unix.Iovec{nonblock.Iovec(r.hdr[:]), nonblock.Iovec(r.head.AsSlice()), nonblock.Iovec(r.body.AsSlice())}
	r.readFn = r.read
	return r
}

func (r *receiver) release() {
	r.head.Release()
	r.body.Release()
}

// read reads one frame, when there is one. It is a syscall.RawConn's callback; it never asks to be called again.
func (r *receiver) read(fd uintptr) bool {
	for !r.poller.stopped.Load() {
		r.n, r.err = nonblock.Readv(int(fd), r.iovs[:])
		if r.err != unix.EAGAIN {
			return true
		}
		if r.err = r.poller.wait(int(fd)); r.err != nil {
			r.n = 0
			return true
		}
	}
	r.n, r.err = 0, os.ErrDeadlineExceeded
	return true
}

// start is the packet's beginning, as much as there is in the first buffer.
func (r *receiver) start() []byte {
	return r.head.AsSlice()[:min(max(r.n-virtioHdrLen, 0), headSize)]
}

// rest is what of the packet did not fit into the first buffer.
func (r *receiver) rest() []byte { return r.body.AsSlice()[:max(r.n-virtioHdrLen-headSize, 0)] }

// take returns the packet and gets the receiver ready for the next one.
func (r *receiver) take() buffer.Buffer {
	start := r.start()
	if len(start) <= smallPacket {
		v := buffer.NewView(len(start))
		v.Write(start)
		return buffer.MakeWithView(v)
	}
	r.head.CapLength(len(start))
	b := buffer.MakeWithView(r.head)
	r.head = buffer.NewViewSize(headSize)
	r.iovs[1] = nonblock.Iovec(r.head.AsSlice())

	rest := r.n - virtioHdrLen - headSize
	switch {
	case rest <= 0:
	case rest <= bodySize/2: // a smaller chunk holds it
		v := buffer.NewView(rest)
		v.Write(r.rest())
		b.Append(v)
	default:
		r.body.CapLength(rest)
		b.Append(r.body)
		r.body = buffer.NewViewSize(bodySize)
		r.iovs[2] = nonblock.Iovec(r.body.AsSlice())
	}
	return b
}

// sender writes one packet.
type sender struct {
	link    *link
	hdr     [virtioHdrLen]byte
	iovs    []unix.Iovec
	err     error
	writeFn func(fd uintptr) bool // write; made once
}

var senders = sync.Pool{New: func() any {
	s := &sender{}
	s.writeFn = s.write
	return s
}}

func (l *link) sender() *sender {
	s := senders.Get().(*sender)
	s.link = l
	return s
}

func (s *sender) release() {
	clear(s.iovs) // the pool must not keep the packets' memory
	s.link = nil
	senders.Put(s)
}

func (s *sender) write(fd uintptr) bool {
	_, s.err = s.link.writev(int(fd), s.iovs)
	return s.err != unix.EAGAIN
}

// flush writes iovs, and waits for the TUN to take them.
func (s *sender) flush() error {
	if err := s.link.raw.Write(s.writeFn); err != nil {
		return err
	}
	return s.err
}

// WritePacket sends pkt. It waits for the TUN to take it: a dropped packet costs a retransmission timeout, and the wait
// is what slows down a sender that is too fast. A packet that the TUN refuses is counted and lost, as on any link.
func (l *link) WritePacket(pkt *stack.PacketBuffer) tcpip.Error {
	if !l.handshakes.Take(pkt) {
		l.send(pkt)
	}
	return nil
}

// send sends pkt, or counts it as lost.
func (l *link) send(pkt *stack.PacketBuffer) {
	s := l.sender()
	s.send(pkt)
	s.release()
}

// WritePackets is WritePacket for each of pkts.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		l.WritePacket(pkt)
	}
	return pkts.Len(), nil
}

// send sends pkt, or counts it as lost.
func (s *sender) send(pkt *stack.PacketBuffer) {
	l := s.link
	hdr := virtioHdrFor(pkt)
	todo := hdr != virtioHdr{} // the kernel has something to finish
	if todo && l.plain.Load() {
		s.sendCut(pkt)
		return
	}
	hdr.encode(s.hdr[:])
	s.iovs = append(s.iovs[:0], nonblock.Iovec(s.hdr[:]))
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		s.iovs = append(s.iovs, nonblock.Iovec(b[skip:]))
		skip = 0
	}
	err := s.flush()
	if err == nil {
		return
	}
	if todo && errors.Is(err, unix.EINVAL) {
		// Some kernels accept TUNSETOFFLOAD and then refuse what it promised (6.6 before 89add40066f9). New
		// connections are told by SupportedGSO; those that stand go on as they began.
		if l.plain.CompareAndSwap(false, true) {
			l.log.Warn("tun refuses a packet, segmentation offload is given up", "bytes", pkt.Size(), "mss", hdr.gsoSize, "err", err)
		}
		s.sendCut(pkt)
		return
	}
	l.lost.Add(1)
}

// sendCut sends pkt with nothing left for the kernel to do.
func (s *sender) sendCut(pkt *stack.PacketBuffer) {
	b := packets.Get().(*[gsoMaxSize]byte)
	defer packets.Put(b)
	virtioHdr{}.encode(s.hdr[:])
	ok := segments(flatten(b[:], pkt), int(pkt.GSOOptions.MSS), func(headers, payload []byte) {
		s.iovs = append(s.iovs[:0], nonblock.Iovec(s.hdr[:]), nonblock.Iovec(headers), nonblock.Iovec(payload))
		if s.flush() != nil {
			s.link.lost.Add(1)
		}
	})
	if !ok {
		s.link.lost.Add(1)
		return
	}
	s.link.cut.Add(1)
}

// inject sends a frame that has its virtio header already.
func (l *link) inject(frame []byte) error {
	s := l.sender()
	defer s.release()
	s.iovs = append(s.iovs[:0], nonblock.Iovec(frame))
	return s.flush()
}

// MTU, with the following, is what stack.LinkEndpoint asks for.
func (l *link) MTU() uint32       { return l.mtu.Load() }
func (l *link) SetMTU(mtu uint32) { l.mtu.Store(mtu) }

// Capabilities says that what the kernel hands us needs no checksum verified: packets from a container on this
// machine have not been on a wire, and most carry none yet. It does not promise checksums on the way out, although
// the kernel would make them: netstack then leaves them out of SYN and RST segments as well, which carry no
// GSOOptions that would tell the kernel so.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	if !l.offload {
		return stack.CapabilityNone
	}
	return stack.CapabilityRXChecksumOffload
}

// GSOMaxSize is the longest packet WritePackets is to be given.
func (l *link) GSOMaxSize() uint32 { return gsoMaxSize }

// SupportedGSO tells netstack to send super-segments: with offload the kernel cuts them (or does not need to),
// without, netstack cuts them itself below its TCP, which still spares the per-segment work above. It is asked once for
// each connection.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.offload && !l.plain.Load() {
		return stack.HostGSOSupported
	}
	return stack.GVisorGSOSupported
}

// Attach is called with the stack's NIC, and with nil when it goes.
func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

func (l *link) IsAttached() bool                        { return l.dispatcher.Load() != nil }
func (l *link) MaxHeaderLength() uint16                 { return 0 } // the virtio header has its own place
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Wait()                                   {} // netstack.run joins receive
func (l *link) Close()                                  {} // the TUN is its opener's
func (l *link) SetOnCloseAction(func())                 {}
