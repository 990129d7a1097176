package redirect

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// tableName is the table's name in the family inet. What nft would say of it:
//
//	map any4      { type inet_proto . inet_service : inet_service }              likewise any6
//	map one4      { type inet_proto . inet_service . ipv4_addr : inet_service }  likewise one6
//	set private   { type inet_proto . inet_service }
//	chain in      { type nat hook prerouting priority -90
//	                meta nfproto ipv4 dnat to :meta l4proto . th dport . ip daddr map @one4
//	                meta nfproto ipv4 fib daddr type local dnat to :meta l4proto . th dport map @any4
//	                and the same for IPv6 }
//	chain out     { type nat hook output priority -90; the same }
//	chain guard   { type filter hook input priority 0
//	                meta l4proto tcp meta l4proto . th dport @private ct status & dnat == 0 reject with tcp reset
//	                meta l4proto . th dport @private ct status & dnat == 0 reject with icmpx port-unreachable }
//
// A DNAT to a port without an address leaves the address alone.
const tableName = "usernet-ports"

// afterOthers is the priority of our NAT: behind that of everybody's destination NAT (-100), whose decisions stand.
const afterOthers = nftables.ChainPriority(-90)

// kernel is the parts of the table.
type kernel struct {
	table    *nftables.Table
	families [2]family
	private  *nftables.Set
}

// family is the maps of one address family: redirections at all addresses of the host, and at one.
type family struct {
	nfproto  byte
	daddr    uint32 // where the destination is in the network header
	size     uint32 // and how long it is
	any, one *nftables.Set
}

func newKernel() *kernel {
	k := &kernel{table: &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}}
	set := func(name string, key ...nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: k.table, Name: name, Concatenation: true, KeyType: nftables.MustConcatSetType(key...)}
	}
	portMap := func(name string, key ...nftables.SetDatatype) *nftables.Set {
		s := set(name, key...)
		s.IsMap, s.DataType = true, nftables.TypeInetService
		return s
	}
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	k.private = set("private", proto, port)
	k.families = [2]family{
		{unix.NFPROTO_IPV4, 16, 4, portMap("any4", proto, port), portMap("one4", proto, port, nftables.TypeIPAddr)},
		{unix.NFPROTO_IPV6, 24, 16, portMap("any6", proto, port), portMap("one6", proto, port, nftables.TypeIP6Addr)},
	}
	return k
}

// declare replaces the table by one without elements in one transaction, or only removes it.
func (k *kernel) declare(wanted bool) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	// A kernel without nf_tables answers a whole batch with one error, and Flush would wait for the others.
	if _, err := c.ListTablesOfFamily(nftables.TableFamilyINet); err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	c.AddTable(k.table) // so that it can be deleted
	c.DelTable(k.table)
	if wanted {
		if err := k.addTable(c); err != nil {
			return err
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set nftables table %s: %w", tableName, err)
	}
	return nil
}

func (k *kernel) addTable(c *nftables.Conn) error {
	c.AddTable(k.table)
	for _, s := range []*nftables.Set{k.families[0].any, k.families[0].one, k.families[1].any, k.families[1].one, k.private} {
		if err := c.AddSet(s, nil); err != nil {
			return fmt.Errorf("add nftables set %s: %w", s.Name, err)
		}
	}
	for name, hook := range map[string]*nftables.ChainHook{"in": nftables.ChainHookPrerouting, "out": nftables.ChainHookOutput} {
		priority := afterOthers
		chain := c.AddChain(&nftables.Chain{Name: name, Table: k.table, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: &priority})
		for _, f := range k.families {
			c.AddRule(&nftables.Rule{Table: k.table, Chain: chain, Exprs: f.atOne()})
			c.AddRule(&nftables.Rule{Table: k.table, Chain: chain, Exprs: f.atAny()})
		}
	}
	guard := c.AddChain(&nftables.Chain{
		Name: "guard", Table: k.table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	})
	tcp := k.guardExprs(unix.IPPROTO_TCP, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST})
	udp := k.guardExprs(unix.IPPROTO_UDP, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH})
	c.AddRule(&nftables.Rule{Table: k.table, Chain: guard, Exprs: tcp})
	c.AddRule(&nftables.Rule{Table: k.table, Chain: guard, Exprs: udp})
	return nil
}

// The parts of a concatenated key begin in registers of four bytes.
const (
	reg      = 1
	regPort  = unix.NFT_REG32_01
	regAddr  = unix.NFT_REG32_02
	statusDN = 1 << 5 // IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h
)

// protoAndPort loads the key's beginning.
func protoAndPort() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Payload{DestRegister: regPort, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func (f family) is() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{f.nfproto}},
	}
}

func (f family) atOne() []expr.Any {
	es := append(f.is(), protoAndPort()...)
	es = append(es, &expr.Payload{DestRegister: regAddr, Base: expr.PayloadBaseNetworkHeader, Offset: f.daddr, Len: f.size})
	return append(es, toPortIn(f.one)...)
}

func (f family) atAny() []expr.Any {
	es := append(f.is(),
		&expr.Fib{Register: reg, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)})
	es = append(es, protoAndPort()...)
	return append(es, toPortIn(f.any)...)
}

func toPortIn(s *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: s.Name, SetID: s.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_INET, RegProtoMin: reg, Specified: true},
	}
}

// guardExprs answers whoever was not redirected as if nobody listened there.
func (k *kernel) guardExprs(proto byte, verdict expr.Any) []expr.Any {
	is := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{proto}},
	}
	return append(append(is, protoAndPort()...),
		&expr.Lookup{SourceRegister: reg, SetName: k.private.Name, SetID: k.private.ID},
		&expr.Ct{Key: expr.CtKeySTATUS, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(statusDN), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: make([]byte, 4)},
		verdict)
}

// A netlink attribute has 64 KiB and a socket's buffer some 200, which an element uses about 60 bytes of.
const (
	perMessage = 500
	perFlush   = 4 // messages
)

func (k *kernel) add(entries map[entry]uint16, ours map[listener]uint16) error {
	return k.change(entries, ours, (*nftables.Conn).SetAddElements)
}

func (k *kernel) delete(entries map[entry]uint16, ours map[listener]uint16) error {
	return k.change(entries, ours, (*nftables.Conn).SetDeleteElements)
}

// change adds elements to the maps and to the set of private ports, or deletes them.
func (k *kernel) change(entries map[entry]uint16, ours map[listener]uint16, do func(*nftables.Conn, *nftables.Set, []nftables.SetElement) error) error {
	elements := map[*nftables.Set][]nftables.SetElement{}
	for e, to := range entries {
		s, key := k.element(e)
		elements[s] = append(elements[s], nftables.SetElement{Key: key, Val: binaryutil.BigEndian.PutUint16(to)})
	}
	for l := range ours {
		elements[k.private] = append(elements[k.private], nftables.SetElement{Key: protoPort(l.proto, l.port)})
	}
	if len(elements) == 0 {
		return nil
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	messages := 0
	for s, all := range elements {
		for some := range slices.Chunk(all, perMessage) {
			if err := do(c, s, some); err != nil {
				return fmt.Errorf("change nftables set %s: %w", s.Name, err)
			}
			if messages++; messages%perFlush == 0 {
				if err := flush(c); err != nil {
					return err
				}
			}
		}
	}
	return flush(c)
}

func flush(c *nftables.Conn) error {
	if err := c.Flush(); err != nil {
		return fmt.Errorf("change nftables table %s: %w", tableName, err)
	}
	return nil
}

// element is the map that an entry belongs in, and its key there.
func (k *kernel) element(e entry) (*nftables.Set, []byte) {
	f := k.families[0]
	if e.at.Addr().Is6() {
		f = k.families[1]
	}
	key := protoPort(e.proto, e.at.Port())
	if e.at.Addr().IsUnspecified() {
		return f.any, key
	}
	return f.one, append(key, e.at.Addr().AsSlice()...)
}

// protoPort is inet_proto . inet_service, each padded to four bytes.
func protoPort(proto usernet.Proto, port uint16) []byte {
	key := make([]byte, 8, 24)
	key[0] = unix.IPPROTO_TCP
	if proto == usernet.UDP {
		key[0] = unix.IPPROTO_UDP
	}
	binary.BigEndian.PutUint16(key[4:], port)
	return key
}

func (k *kernel) exists() (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == tableName }), nil
}

// has tells whether the kernel has the table with its rules and as many redirections as are wanted.
func (k *kernel) has(want map[entry]uint16) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list nftables chains: %w", err)
	}
	ours := 0
	for _, chain := range chains {
		if chain.Table.Name != tableName {
			continue
		}
		rules, err := c.GetRules(k.table, chain)
		if err != nil {
			return false, fmt.Errorf("list nftables rules: %w", err)
		}
		ours += len(rules)
	}
	if ours != 2*2*len(k.families)+2 { // two rules for each family in two chains, and the guard's
		return false, nil
	}
	found := 0
	for _, f := range k.families {
		for _, s := range []*nftables.Set{f.any, f.one} {
			elements, err := c.GetSetElements(s)
			if err != nil {
				return false, fmt.Errorf("list nftables set %s: %w", s.Name, err)
			}
			found += len(elements)
		}
	}
	return found == len(want), nil
}
