// Package endpoint puts containers on a network: a segment is the network's kernel bridge with its gateway addresses,
// and a link is the veth pair by which one container hangs on it. On a bridge network the bridge is in the host's
// namespace; on a usermode network it is in the network's fabric, whose gateway package usermode is. Which container
// gets which address, and when, is decided elsewhere.
package endpoint

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/dump"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/usermode"
)

// FabricBridge is the name of the bridge inside a usermode network's fabric.
const FabricBridge = "br0"

// Config says what a segment is made for and where.
type Config struct {
	Network usernet.Network
	Dir     string                // where namespaces of usermode networks are pinned
	Added   []netip.Prefix        // what Added returned when the segment was first opened; nil the first time
	Blocked func(netip.Addr) bool // usermode: see usermode.Config
	Host    func() netip.Addr     // likewise
	Log     *slog.Logger
}

// Segment is one network's bridge. Its methods may be called from several goroutines, but not for one endpoint at a
// time.
type Segment struct {
	network usernet.Network
	adopted bool           // somebody else made the bridge
	added   []netip.Prefix // the addresses that we put on it

	home    *netns.NS // the host's namespace, where containers' ends appear
	ns      *netns.NS // the namespace of the bridge
	nl      *netlink.Handle
	bridge  int               // its interface index
	gateway *usermode.Gateway // nil on a bridge network
}

// Open makes the network's bridge, or takes it as an earlier process left it, and declares its state. It may be called
// again after a crash at any point. A bridge that the user named and that exists already is adopted: it gets the
// gateway address if it lacks it, nothing else of it is changed.
func Open(cfg Config) (_ *Segment, err error) {
	s := &Segment{network: cfg.Network, added: cfg.Added}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.home, err = netns.Current(); err != nil {
		return nil, err
	}
	s.ns = s.home
	if cfg.Network.Options.Mode == usernet.Usermode {
		s.gateway, err = usermode.Open(usermode.Config{
			ID:       cfg.Network.ID,
			Dir:      cfg.Dir,
			Bridge:   FabricBridge,
			Subnets:  cfg.Network.Subnets,
			MTU:      cfg.Network.MTU(),
			Internal: cfg.Network.Internal,
			Blocked:  cfg.Blocked,
			Host:     cfg.Host,
			FastPath: cfg.Network.Options.FastPath,
			Log:      cfg.Log,
		})
		if err != nil {
			return nil, err
		}
		s.ns = s.gateway.Netns()
	}
	if s.nl, err = handleIn(s.ns); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if s.foreign() {
		return s, nil
	}
	if err := s.setBridge(); err != nil {
		return nil, err
	}
	return s, nil
}

// foreign tells that there is no bridge of ours and no link: a Segment without anything in the kernel.
func (s *Segment) foreign() bool { return s.network.Options.Mode == usernet.Foreign }

// handleIn opens a netlink handle in ns. (Package netlink would, too, but counts on being able to come back.)
func handleIn(ns *netns.NS) (h *netlink.Handle, err error) {
	err = ns.Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	return h, err
}

// BridgeName is the name of the bridge in its namespace.
func (s *Segment) BridgeName() string {
	if s.gateway != nil {
		return FabricBridge
	}
	return s.network.BridgeName()
}

// Added returns the addresses that were put on the bridge. The caller keeps them for Config.Added, so that an adopted
// bridge can be given back as it was.
func (s *Segment) Added() []netip.Prefix { return s.added }

// Gateway is the usermode gateway of the segment; nil on a bridge network.
func (s *Segment) Gateway() *usermode.Gateway { return s.gateway }

// Run carries the network's traffic as far as that is our work, and calls gone whenever a link of the bridge has
// vanished, until ctx is done.
func (s *Segment) Run(ctx context.Context, gone func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan error, 1)
	go func() {
		err := watch(ctx, s.ns, usernet.Endpoint{}.HostName(), gone)
		cancel()
		watched <- err
	}()
	var err error
	if s.gateway != nil {
		err = s.gateway.Run(ctx)
		cancel()
	}
	return errors.Join(err, <-watched)
}

// setBridge declares the bridge: it exists, carries the gateway addresses and is up.
func (s *Segment) setBridge() error {
	name := s.BridgeName()
	link, err := s.nl.LinkByName(name)
	switch {
	case err == nil:
		if link.Type() != "bridge" {
			return fmt.Errorf("%w: the link %s is there and is a %s, not a bridge", usernet.ErrExists, name, link.Type())
		}
		s.adopted = !madeFor(link, s.network)
		if s.adopted && s.network.Options.BridgeName == "" && s.gateway == nil {
			return fmt.Errorf("%w: the bridge %s is there and is not ours", usernet.ErrExists, name)
		}
		if !s.adopted {
			if err := s.setMark(link); err != nil {
				return err
			}
		}
	case errors.As(err, &netlink.LinkNotFoundError{}):
		if link, err = s.addBridge(name); err != nil {
			return err
		}
	default:
		return fmt.Errorf("find bridge %s: %w", name, err)
	}
	s.bridge = link.Attrs().Index
	if err := s.setSysctls(name); err != nil {
		return err
	}
	if err := s.setAddresses(link); err != nil {
		return err
	}
	if err := s.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up bridge %s: %w", name, err)
	}
	return nil
}

func (s *Segment) addBridge(name string) (_ netlink.Link, err error) {
	la := netlink.NewLinkAttrs()
	la.Name = name
	la.MTU = s.network.MTU()
	la.HardwareAddr = bridgeMAC(s.network.ID)
	if err := s.nl.LinkAdd(&netlink.Bridge{LinkAttrs: la}); err != nil {
		return nil, fmt.Errorf("add bridge %s: %w", name, err)
	}
	link, err := s.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", name, err)
	}
	if err := s.setMark(link); err != nil {
		return nil, errors.Join(err, s.nl.LinkDel(link))
	}
	return link, nil
}

// mark is the alias by which a bridge of ours is known after a restart.
func mark(n usernet.Network) string { return "usernet " + n.ID }

func (s *Segment) setMark(link netlink.Link) error {
	if link.Attrs().Alias == mark(s.network) {
		return nil
	}
	if err := s.nl.LinkSetAlias(link, mark(s.network)); err != nil {
		return fmt.Errorf("mark bridge %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// madeFor tells whether addBridge made the bridge for n. The kernel takes an alias for links that exist, not for new ones: one
// whose maker was killed in between has no alias, but an address that nobody else chooses.
func madeFor(link netlink.Link, n usernet.Network) bool {
	a := link.Attrs()
	return a.Alias == mark(n) || a.Alias == "" && bytes.Equal(a.HardwareAddr, bridgeMAC(n.ID))
}

// setAddresses gives the bridge the gateway addresses that it lacks.
func (s *Segment) setAddresses(link netlink.Link) error {
	if s.network.Options.InhibitHostIP {
		return nil
	}
	have, err := dump.Whole(func() ([]netlink.Addr, error) { return s.nl.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, sub := range s.network.Subnets {
		if !sub.Gateway.IsValid() {
			continue
		}
		want := netip.PrefixFrom(sub.Gateway, sub.Prefix.Bits())
		if hasAddr(have, want) {
			continue
		}
		if err := s.nl.AddrAdd(link, addr(want)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add %s to bridge %s: %w", want, link.Attrs().Name, err)
		}
		s.added = append(s.added, want)
	}
	return nil
}

func hasAddr(have []netlink.Addr, want netip.Prefix) bool {
	for _, a := range have {
		if a.IPNet.String() == want.String() {
			return true
		}
	}
	return false
}

// addr is p for the kernel, usable at once: the network's gateway is ours by agreement, so duplicate address
// detection (RFC 4862 §5.4) could only delay the first container.
func addr(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// bridgeMAC is a locally administered address made from the network's ID. A bridge without one of its own takes the
// lowest of its ports' and changes it as containers come and go, which breaks their neighbour caches.
func bridgeMAC(id string) net.HardwareAddr {
	sum := sha256.Sum256([]byte("bridge " + id))
	return net.HardwareAddr{0x02, 0x75, sum[0], sum[1], sum[2], sum[3]}
}

// Close lets go of the segment and leaves it in the kernel.
func (s *Segment) Close() error {
	var errs []error
	if s.nl != nil {
		s.nl.Close()
		s.nl = nil
	}
	if s.gateway != nil {
		errs = append(errs, s.gateway.Close())
		s.gateway = nil
	}
	if s.home != nil {
		errs = append(errs, s.home.Close())
		s.home = nil
	}
	return errors.Join(errs...)
}

// Remove takes a network's segment out of the kernel, open or not; its links should be closed before. What is gone
// already is fine. An adopted bridge stays and loses only the addresses of cfg.Added.
func Remove(cfg Config) error {
	if cfg.Network.Options.Mode == usernet.Usermode {
		return usermode.Remove(cfg.Dir, cfg.Network.ID)
	}
	if cfg.Network.Options.Mode == usernet.Foreign {
		return nil
	}
	name := cfg.Network.BridgeName()
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", name, err)
	}
	if madeFor(link, cfg.Network) {
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("delete bridge %s: %w", name, err)
		}
		return nil
	}
	var errs []error
	for _, a := range cfg.Added {
		if err := netlink.AddrDel(link, addr(a)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("take %s off bridge %s: %w", a, name, err))
		}
	}
	return errors.Join(errs...)
}
