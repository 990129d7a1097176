package usermode

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/splice"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// The fast path: a TCP connection out of the network is taken over by the fabric's kernel as soon as its destination
// has answered, and spliced to the host's socket.
//
//	container ── SYN ──► un0 ──► fastPath: connect to the destination from the host
//	                                 │ refused: RST, as the destination said
//	container ◄─ SYN-ACK ─ kernel ◄──┘ stands: the SYN goes back into the fabric, where TPROXY gives it to our listener
//	container ◄──────────► kernel: the divert rule brings the rest of the connection to the socket that accepted it
//
// TPROXY for all SYNs at once would spare the detour, but accepts every connection before anybody has dialled: what is
// refused or unreachable would look established and then reset, and a client with an IPv6 address would never get
// around to trying IPv4 on a host without IPv6.
//
// Nothing here waits for anything. The TUN's reader carries a connection from its SYN as far as it goes, which on one
// machine is to the end: connect(2) to a neighbour and a SYN written to the TUN have run through both kernels' stacks
// when they return.
type fastPath struct {
	log       *slog.Logger
	resolve   func(netip.Addr) (netip.Addr, bool)
	listeners []*transparent
	pending   *tcprelay.Quota // connections that are being made
	made      *tcprelay.Quota // and those, too

	group *splice.Group // of the present run

	mu       sync.Mutex
	openings map[route]*opening
}

// transparent is a listener in the fabric, on its loopback, for connections to any address.
type transparent struct {
	fd     int
	at     netip.AddrPort
	expect func(bool) // of the present run
	late   int        // openings that wait for it; fastPath.mu
}

// route is a connection as its container sees it.
type route struct{ client, destination netip.AddrPort }

// declareFastPath makes the listeners and the rules. It runs in the fabric, after declareDivert. Without it, netstack
// carries everything.
func (f *fabric) declareFastPath() error {
	if f.divertErr != nil {
		return f.divertErr
	}
	loopbacks := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	if f.ipv6 {
		loopbacks = append(loopbacks, netip.IPv6Loopback())
	}
	var listeners []*transparent
	var undo undo.List
	for _, lo := range loopbacks {
		fd, port, err := splice.Listen(netip.AddrPortFrom(lo, 0), true)
		if err != nil {
			return errors.Join(fmt.Errorf("listen for the fast path: %w", err), undo.Close())
		}
		undo.Push(func() error { return unix.Close(fd) })
		listeners = append(listeners, &transparent{fd: fd, at: netip.AddrPortFrom(lo, port)})
	}
	if err := tproxyRules(listeners); err != nil {
		return errors.Join(err, undo.Close())
	}
	f.undo.Push(undo.Close)
	f.listeners = listeners
	return nil
}

// newFastPath carries connections to the listeners of f.
func newFastPath(f *fabric, resolve func(netip.Addr) (netip.Addr, bool)) *fastPath {
	return &fastPath{
		log:       f.cfg.Log,
		resolve:   resolve,
		listeners: f.listeners,
		pending:   tcprelay.NewQuota(tcprelay.MaxHandshakes, tcprelay.MaxClientHandshakes),
		made:      tcprelay.NewQuota(tcprelay.MaxConns, tcprelay.MaxClientConns),
		openings:  make(map[route]*opening),
	}
}

// tproxyRules adds, behind the divert rule and for each listener: iifname un0 tcp flags & (fin|syn|rst|ack) == syn tproxy to
// the listener, meta mark set 1, accept. netstack never sends a SYN alone: what comes from the TUN and is one, was sent
// back by us.
func tproxyRules(listeners []*transparent) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: nftTable}
	chain := &nftables.Chain{Name: nftChain, Table: table}
	for _, ln := range listeners {
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: tproxyExprs(ln.at)})
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

// begin gets ready for take, and returns what is called when nothing is taken any more: it ends the connections and
// returns when they have ended.
func (f *fastPath) begin() (end func()) {
	f.group = new(splice.Group)
	for _, ln := range f.listeners {
		ln.expect = f.group.ServeOnDemand(ln.fd, f.log, f.deliver)
	}
	return func() {
		f.group.Close()
		f.mu.Lock()
		left := slices.Collect(maps.Values(f.openings))
		f.mu.Unlock()
		for _, o := range left {
			o.giveUp(splice.ErrClosed)
		}
	}
}
