package usermode

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

const (
	uplink      = "un0" // the TUN device
	uplinkQueue = 4096  // packets; the default of 500 overflows in one burst of small packets, and TUN drops its tail
)

// declare makes the fabric what it must be, whatever an earlier run left. It runs inside the fabric and sets what the
// Gateway learns there.
func (g *Gateway) declare() error {
	g.ipv6 = hasIPv6() && wantsIPv6(g.cfg.Subnets)
	if err := setSysctls(g.sysctls()); err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	if g.cfg.Internal {
		return nil
	}
	if g.tun, err = attachTUN(h); err != nil {
		return err
	}
	g.undo.Push(g.tun.Close)
	if err := g.declareUplink(h); err != nil {
		return err
	}
	g.offload = g.negotiateOffload()
	if g.divertErr = g.declareDivert(h, lo); g.divertErr != nil {
		g.cfg.Log.Warn("containers see the gateway's address instead of a published port's client", "reason", g.divertErr)
	}
	if g.cfg.FastPath {
		if g.fastErr = g.declareFastPath(); g.fastErr != nil {
			g.cfg.Log.Warn("no fast path for TCP, netstack carries it", "reason", g.fastErr)
		}
	}
	return nil
}

// declareUplink configures the TUN device and routes everything that is not the network's own into it.
func (g *Gateway) declareUplink(h *netlink.Handle) error {
	link, err := h.LinkByName(uplink)
	if err != nil {
		return fmt.Errorf("find %s: %w", uplink, err)
	}
	if g.ipv6 {
		// 1: no link-local address. Nobody on the other side would speak to it.
		if err := setSysctls([]sysctl{{"net/ipv6/conf/" + uplink + "/addr_gen_mode", "1", true}}); err != nil {
			return err
		}
	}
	if err := h.LinkSetTxQLen(link, uplinkQueue); err != nil {
		return fmt.Errorf("set queue length of %s: %w", uplink, err)
	}
	if err := h.LinkSetMTU(link, g.cfg.MTU); err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", uplink, g.cfg.MTU, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", uplink, err)
	}
	for _, family := range g.families() {
		route := &netlink.Route{
			Family: family, LinkIndex: link.Attrs().Index, Dst: everywhere(family), Scope: netlink.SCOPE_LINK,
		}
		if err := h.RouteReplace(route); err != nil {
			return fmt.Errorf("add route %s dev %s: %w", route.Dst, uplink, err)
		}
	}
	return nil
}

// families are the address families that the fabric routes.
func (g *Gateway) families() []int {
	if g.ipv6 {
		return []int{unix.AF_INET, unix.AF_INET6}
	}
	return []int{unix.AF_INET}
}

func everywhere(family int) *net.IPNet {
	if family == unix.AF_INET6 {
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6/conf/all")
	return err == nil
}

func wantsIPv6(subnets []usernet.Subnet) bool {
	for _, s := range subnets {
		if s.Prefix.Addr().Is6() {
			return true
		}
	}
	return false
}

// sysctl is one setting below /proc/sys, where net is that of the calling thread's namespace.
type sysctl struct {
	name, value string
	optional    bool // absent from kernels that were built or booted without the feature
}

// sysctls are the fabric's settings. A new namespace inherits most of IPv4's from the host, where they may be
// anything; a link inherits those of "default" when it is made.
func (g *Gateway) sysctls() []sysctl {
	forward := "1"
	if g.cfg.Internal {
		forward = "0"
	}
	list := []sysctl{
		// First: a write resets settings that depend on being a host or a router.
		{"net/ipv4/ip_forward", forward, false},
		// Replies to a published port's client go to an address that the routes place elsewhere.
		{"net/ipv4/conf/all/rp_filter", "0", false},
		{"net/ipv4/conf/default/rp_filter", "0", false},
		{"net/ipv4/conf/lo/rp_filter", "0", false},
		// The fabric's loopback is no container's business, and its routes are ours alone.
		{"net/ipv4/conf/all/route_localnet", "0", false},
		{"net/ipv4/conf/default/route_localnet", "0", false},
		{"net/ipv4/conf/all/accept_redirects", "0", false},
		{"net/ipv4/conf/default/accept_redirects", "0", false},
		// With these on, every bridged packet would pass the divert rule as if it were routed.
		{"net/bridge/bridge-nf-call-iptables", "0", true},
		{"net/bridge/bridge-nf-call-ip6tables", "0", true},
		{"net/bridge/bridge-nf-call-arptables", "0", true},
	}
	if !hasIPv6() {
		return list
	}
	disable := "1"
	if g.ipv6 {
		disable = "0"
	} else {
		forward = "0"
	}
	for _, conf := range []string{"all", "default"} {
		list = append(list,
			sysctl{"net/ipv6/conf/" + conf + "/disable_ipv6", disable, false},
			sysctl{"net/ipv6/conf/" + conf + "/forwarding", forward, false},
			sysctl{"net/ipv6/conf/" + conf + "/accept_dad", "0", false},
			sysctl{"net/ipv6/conf/" + conf + "/accept_ra", "0", false},
			sysctl{"net/ipv6/conf/" + conf + "/accept_redirects", "0", false},
		)
	}
	return list
}

// setSysctls writes the settings that differ. It reads first because /proc/sys is read-only in many containers, where
// what is right already must do.
func setSysctls(list []sysctl) error {
	for _, s := range list {
		path := "/proc/sys/" + s.name
		old, err := os.ReadFile(path)
		if s.optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil && strings.TrimSpace(string(old)) == s.value {
			continue
		}
		if err == nil {
			err = os.WriteFile(path, []byte(s.value), 0)
		}
		if err != nil {
			return fmt.Errorf("set %s to %s: %w", strings.ReplaceAll(s.name, "/", "."), s.value, err)
		}
	}
	return nil
}
