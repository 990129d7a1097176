package usermode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/splice"
)

// The fast path: a TCP connection out of the network is taken over by the fabric's kernel as soon as its destination
// has answered, and spliced to the host's socket. netstack sees the first SYN only.
//
//	container ── SYN ──► un0 ──► netstack: dial the destination from the host
//	                                 │ refused: RST, as the destination said
//	container ◄─ SYN-ACK ─ kernel ◄──┘ stands: the SYN goes back into the fabric, where TPROXY gives it to our listener
//	container ◄──────────► kernel: the divert rule brings the rest of the connection to the socket that accepted it
//
// TPROXY for all SYNs at once would spare the detour, but accepts every connection before anybody has dialled: what is
// refused or unreachable would look established and then reset, and a client with an IPv6 address would never get
// around to trying IPv4 on a host without IPv6.
type fastPath struct {
	log       *slog.Logger
	listeners []*net.TCPListener // in the fabric, on its loopback, transparent

	mu      sync.Mutex
	waiting map[route]chan *net.TCPConn // by those whose SYN was sent back
	syns    map[stack.TransportEndpointID]syn
}

// route is a connection as its container sees it.
type route struct{ client, destination netip.AddrPort }

// syn is the packet that asked for a connection.
type syn struct {
	frame []byte // with an empty virtio header
	at    time.Time
}

// declareFastPath makes the listeners and the rules. It runs in the fabric, after declareDivert. Without it, netstack
// carries everything.
func (g *Gateway) declareFastPath() error {
	if g.divertErr != nil {
		return g.divertErr
	}
	f := &fastPath{log: g.cfg.Log, waiting: map[route]chan *net.TCPConn{}, syns: map[stack.TransportEndpointID]syn{}}
	loopbacks := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	if g.ipv6 {
		loopbacks = append(loopbacks, netip.IPv6Loopback())
	}
	for _, lo := range loopbacks {
		ln, err := listenTransparent(lo)
		if err != nil {
			return errors.Join(fmt.Errorf("listen for the fast path: %w", err), f.close())
		}
		f.listeners = append(f.listeners, ln)
	}
	if err := f.rules(); err != nil {
		return errors.Join(err, f.close())
	}
	g.fast = f
	g.undo.Push(f.close)
	return nil
}

// listenTransparent listens at a, on a port of the kernel's choice, for connections to any address.
func listenTransparent(a netip.Addr) (*net.TCPListener, error) {
	network, family := "tcp4", unix.AF_INET
	if a.Is6() {
		network, family = "tcp6", unix.AF_INET6
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var serr error
		err := c.Control(func(fd uintptr) { serr = setTransparent(int(fd), family) })
		return errors.Join(err, serr)
	}}
	lc.SetMultipathTCP(false) // splice(2) does not work on an MPTCP socket, and Go listens with MPTCP by default
	ln, err := lc.Listen(context.Background(), network, netip.AddrPortFrom(a, 0).String())
	if err != nil {
		return nil, err
	}
	return ln.(*net.TCPListener), nil
}

func (f *fastPath) close() error {
	var errs []error
	for _, ln := range f.listeners {
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// rules adds, behind the divert rule and for each listener: iifname un0 tcp flags & (fin|syn|rst|ack) == syn tproxy to
// the listener, meta mark set 1, accept. netstack never sends a SYN alone: what comes from the TUN and is one, was sent
// back by us.
func (f *fastPath) rules() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: nftTable}
	chain := &nftables.Chain{Name: nftChain, Table: table}
	for _, ln := range f.listeners {
		at := addrPortOf(ln.Addr())
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: tproxyExprs(at)})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set nftables rule for TPROXY: %w", err)
	}
	return nil
}

func tproxyExprs(to netip.AddrPort) []expr.Any {
	const address, port = 1, 2
	family := byte(unix.NFPROTO_IPV4)
	if to.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, uplink)
	flags := byte(header.TCPFlagFin | header.TCPFlagSyn | header.TCPFlagRst | header.TCPFlagAck)
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: address},
		&expr.Cmp{Op: expr.CmpOpEq, Register: address, Data: name},
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: address},
		&expr.Cmp{Op: expr.CmpOpEq, Register: address, Data: []byte{family}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: address},
		&expr.Cmp{Op: expr.CmpOpEq, Register: address, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: address, Base: expr.PayloadBaseTransportHeader, Offset: header.TCPFlagsOffset, Len: 1},
		&expr.Bitwise{SourceRegister: address, DestRegister: address, Len: 1, Mask: []byte{flags}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: address, Data: []byte{byte(header.TCPFlagSyn)}},
		&expr.Immediate{Register: address, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: port, Data: binaryutil.BigEndian.PutUint16(to.Port())},
		&expr.TProxy{Family: family, TableFamily: byte(nftables.TableFamilyINet), RegAddr: address, RegPort: port},
		&expr.Immediate{Register: address, Data: binaryutil.NativeEndian.PutUint32(divertMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: address},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

// spliced is a connection on the fast path.
type spliced struct{ container, host *net.TCPConn }

// run relays until both sides have closed, one was reset, or ctx is done. It closes both.
func (s spliced) run(ctx context.Context) {
	defer s.host.Close()
	defer s.container.Close()
	splice.Join(ctx, s.container, s.host)
}

func (s spliced) reset() {
	splice.Refuse(s.container)
	splice.Refuse(s.host)
}

// run gives accepted connections to those who wait for them, until ctx is done.
func (f *fastPath) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, ln := range f.listeners {
		ln.SetDeadline(time.Time{}) // an earlier run ended with one
		wg.Go(func() { splice.Accept(ctx, ln, f.log, f.deliver) })
	}
}

// deliver finds out whom an accepted connection is for. One that nobody waits for any more is refused.
func (f *fastPath) deliver(c *net.TCPConn) {
	r := route{addrPortOf(c.RemoteAddr()), addrPortOf(c.LocalAddr())}
	f.mu.Lock()
	defer f.mu.Unlock()
	ch := f.waiting[r]
	if ch == nil {
		splice.Refuse(c)
		return
	}
	delete(f.waiting, r)
	ch <- c // has room; under the lock, or a waiter that gives up just now would leave it behind
}

// accept sends the SYN of id back into the fabric and returns the connection that comes of it.
func (f *fastPath) accept(ctx context.Context, id stack.TransportEndpointID, send func([]byte) error) (*net.TCPConn, error) {
	f.mu.Lock()
	s, ok := f.syns[id]
	delete(f.syns, id)
	r := route{
		netip.AddrPortFrom(toAddr(id.RemoteAddress), id.RemotePort),
		netip.AddrPortFrom(toAddr(id.LocalAddress), id.LocalPort),
	}
	ch := make(chan *net.TCPConn, 1)
	if ok {
		f.waiting[r] = ch
	}
	f.mu.Unlock()
	if !ok {
		return nil, errors.New("no SYN to send back")
	}
	err := send(s.frame)
	if err == nil {
		select {
		case c := <-ch:
			return c, nil
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	f.mu.Lock()
	if f.waiting[r] == ch {
		delete(f.waiting, r)
	}
	f.mu.Unlock()
	select {
	case c := <-ch: // it came after all
		return c, nil
	default:
		return nil, err
	}
}

// remember keeps the packet if it is a SYN, until accept takes it or it is too old to matter: netstack's forwarder may
// pass over it.
func (f *fastPath) remember(id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	frame := synFrame(id, pkt)
	if frame == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if len(f.syns) >= 2*maxHandshakes {
		for id, s := range f.syns {
			if now.Sub(s.at) > connectTimeout {
				delete(f.syns, id)
			}
		}
		if len(f.syns) >= 2*maxHandshakes {
			return
		}
	}
	f.syns[id] = syn{frame, now}
}

// synFrame is pkt as a frame for the TUN if it is a SYN that opens a connection, with its checksum completed: the
// container's kernel has left that to the hardware.
func synFrame(id stack.TransportEndpointID, pkt *stack.PacketBuffer) []byte {
	const openers = header.TCPFlagFin | header.TCPFlagSyn | header.TCPFlagRst | header.TCPFlagAck
	ip, tcp := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	if len(tcp) < header.TCPMinimumSize || header.TCP(tcp).Flags()&openers != header.TCPFlagSyn {
		return nil
	}
	payload := pkt.Data().AsRange().ToSlice() // TCP Fast Open, RFC 7413
	frame := make([]byte, virtioHdrLen, virtioHdrLen+len(ip)+len(tcp)+len(payload))
	frame = append(append(append(frame, ip...), tcp...), payload...)
	segment := header.TCP(frame[virtioHdrLen+len(ip):])
	segment.SetChecksum(0)
	pseudo := header.PseudoHeaderChecksum(header.TCPProtocolNumber, id.RemoteAddress, id.LocalAddress, uint16(len(segment)))
	segment.SetChecksum(^checksum.Checksum(segment, pseudo))
	return frame
}

// addrPortOf is the address of a TCP socket.
func addrPortOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
