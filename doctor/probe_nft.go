package doctor

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const nftTable = "usernet-doctor"

// canNftables tells whether the kernel has nf_tables. One without it answers a whole batch with one error, so this
// comes first.
func canNftables() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	if _, err := c.ListTablesOfFamily(nftables.TableFamilyINet); err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	return nil
}

// socketRule is: socket transparent 1.
var socketRule = []expr.Any{
	&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1},
	&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
}

// tproxyRule is: meta nfproto ipv4 meta l4proto tcp tproxy ip to :1.
var tproxyRule = []expr.Any{
	&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
	&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
	&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
	&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(1)},
	&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: byte(nftables.TableFamilyINet), RegPort: 1},
}

// addRule asks the kernel to take a rule where usermode networks have theirs.
func addRule(exprs []expr.Any) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: nftTable})
	chain := c.AddChain(&nftables.Chain{
		Name: "probe", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
	})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("add an nftables rule: %w", err)
	}
	return nil
}
