package usermode

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/undo"
)

const (
	uplink      = "un0" // the TUN device
	uplinkQueue = 4096  // packets; the default of 500 overflows in one burst of small packets, and TUN drops its tail
)

// fabric is a network's own namespace as its gateway has it: descriptors that belong there, and what was found out.
type fabric struct {
	cfg       Config
	tun       *os.File       // nil on an internal network
	offload   bool           // the TUN device takes and gives GSO packets and partial checksums
	listeners []*transparent // of the fast path; none: netstack carries TCP
	fastErr   error          // why that is so although the fast path was asked for
	divertErr error          // why sockets in the fabric cannot take foreign addresses; nil: they can
	ipv6      bool           // the fabric speaks IPv6
	undo      undo.List
}

func newFabric(cfg Config) *fabric {
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &fabric{cfg: cfg}
}

// declare makes the calling thread's namespace the fabric that cfg describes, whatever an earlier run left there.
func declare(cfg Config) (*fabric, error) {
	f := newFabric(cfg)
	if err := f.declare(); err != nil {
		return nil, errors.Join(err, f.undo.Close())
	}
	return f, nil
}

func (f *fabric) declare() error {
	f.ipv6 = hasIPv6() && wantsIPv6(f.cfg.Subnets)
	if err := setSysctls(f.sysctls()); err != nil {
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
	if f.cfg.Internal {
		return nil
	}
	if f.tun, err = attachTUN(h); err != nil {
		return err
	}
	f.undo.Push(f.tun.Close)
	if err := f.declareUplink(h); err != nil {
		return err
	}
	f.offload = f.negotiateOffload()
	if f.divertErr = f.declareDivert(h, lo); f.divertErr != nil {
		f.cfg.Log.Warn("containers see the gateway's address instead of a published port's client", "reason", f.divertErr)
	}
	if f.cfg.FastPath {
		if f.fastErr = f.declareFastPath(); f.fastErr != nil {
			f.cfg.Log.Warn("no fast path for TCP, netstack carries it", "reason", f.fastErr)
		}
	}
	return nil
}

// declareUplink configures the TUN device and routes everything that is not the network's own into it.
func (f *fabric) declareUplink(h *netlink.Handle) error {
	link, err := h.LinkByName(uplink)
	if err != nil {
		return fmt.Errorf("find %s: %w", uplink, err)
	}
	if f.ipv6 {
		// 1: no link-local address. Nobody on the other side would speak to it.
		if err := setSysctls([]sysctl{{"net/ipv6/conf/" + uplink + "/addr_gen_mode", "1", true}}); err != nil {
			return err
		}
	}
	if err := h.LinkSetTxQLen(link, uplinkQueue); err != nil {
		return fmt.Errorf("set queue length of %s: %w", uplink, err)
	}
	if err := h.LinkSetMTU(link, f.cfg.MTU); err != nil {
		return fmt.Errorf("set MTU of %s to %d: %w", uplink, f.cfg.MTU, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", uplink, err)
	}
	for _, family := range f.families() {
		route := &netlink.Route{
			Family: family, LinkIndex: link.Attrs().Index, Dst: everywhere(family), Scope: netlink.SCOPE_LINK,
		}
		if err := h.RouteReplace(route); err != nil {
			return fmt.Errorf("add route %s dev %s: %w", route.Dst, uplink, err)
		}
	}
	return nil
}

// repair sets again what the kernel may have reset: when br_netfilter is loaded, it starts in every namespace with its
// own defaults.
func (f *fabric) repair() error { return setSysctls(bridgeSysctls) }

// families are the address families that the fabric routes.
func (f *fabric) families() []int {
	if f.ipv6 {
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
func (f *fabric) sysctls() []sysctl {
	forward := "1"
	if f.cfg.Internal {
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
	}
	list = append(list, bridgeSysctls...)
	if !hasIPv6() {
		return list
	}
	disable := "1"
	if f.ipv6 {
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

// bridgeSysctls keep bridged packets from passing the divert rule as if they were routed.
var bridgeSysctls = []sysctl{
	{"net/bridge/bridge-nf-call-iptables", "0", true},
	{"net/bridge/bridge-nf-call-ip6tables", "0", true},
	{"net/bridge/bridge-nf-call-arptables", "0", true},
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
