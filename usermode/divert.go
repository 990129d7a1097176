package usermode

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

// A connection that a published port opens into the fabric bears its client's address, so the container answers to
// an address that is not the fabric's. These are the pieces that bring the answer to our socket all the same:
//
//	nft: iifname br0 socket transparent 1 meta mark set 1 accept
//	ip rule add fwmark 1 lookup 100
//	ip route add local default dev lo table 100
//
// The scheme is that of the kernel's Documentation/networking/tproxy.rst.
const (
	divertMark  = 1
	divertTable = 100 // route table, and the rule's priority
	nftTable    = "usernet"
	nftChain    = "divert"
)

// declareDivert sets the pieces up. An error means that sockets cannot take foreign addresses here.
func (f *fabric) declareDivert(h *netlink.Handle, lo netlink.Link) error {
	for _, family := range f.families() {
		if err := canImpersonate(family); err != nil {
			return err
		}
		if err := divertRoute(h, lo, family); err != nil {
			return err
		}
	}
	return divertRules(f.cfg.Bridge)
}

// canImpersonate tries whether the process may make transparent sockets.
func canImpersonate(family int) error {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if family == unix.AF_INET6 {
		return splice.SetTransparent(fd, netip.IPv6Unspecified())
	}
	return splice.SetTransparent(fd, netip.IPv4Unspecified())
}

// divertRoute delivers marked packets to the fabric's own sockets, whatever their destination.
func divertRoute(h *netlink.Handle, lo netlink.Link, family int) error {
	route := &netlink.Route{
		Family: family, LinkIndex: lo.Attrs().Index, Dst: everywhere(family),
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: divertTable,
	}
	if err := h.RouteReplace(route); err != nil {
		return fmt.Errorf("add local route %s to table %d: %w", route.Dst, divertTable, err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Mark, rule.Table = family, divertTable, divertMark, divertTable
	if err := h.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add rule fwmark %d lookup %d: %w", divertMark, divertTable, err)
	}
	return nil
}

// divertRules replaces our nftables table in the calling thread's namespace, in one transaction.
func divertRules(bridge string) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	// A kernel without nf_tables answers a whole batch with one error, and Flush would wait for the others.
	if _, err := c.ListTablesOfFamily(nftables.TableFamilyINet); err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: nftTable}
	c.AddTable(table) // so that it can be deleted
	c.DelTable(table)
	c.AddTable(table)
	chain := c.AddChain(&nftables.Chain{
		Name: nftChain, Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
	})
	// A rule that proxies new connections belongs behind this one, which takes what has a socket already.
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: divertExprs(bridge)})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set nftables table %s (is the socket match missing?): %w", nftTable, err)
	}
	return nil
}

// divertExprs is: iifname BRIDGE socket transparent 1 meta mark set 1 accept. The socket match knows TCP and UDP, and
// ICMP errors about them; it matches nothing else.
func divertExprs(bridge string) []expr.Any {
	const reg = 1
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, bridge)
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: name},
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{1}},
		&expr.Immediate{Register: reg, Data: binaryutil.NativeEndian.PutUint32(divertMark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}
