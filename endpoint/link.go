package endpoint

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/dump"
	"github.com/usernet/usernet/internal/netns"
)

// State says where the container's end of a link is.
type State int

const (
	Gone  State = iota // neither end exists: the container's namespace took them with it
	Home               // in the host's namespace: not handed over yet, or handed back
	Moved              // in a container
)

// Link is the veth pair of one endpoint.
type Link struct {
	HostName string // the end on the bridge
	PeerName string // the container's end, while it is in the host's namespace
	First    bool   // after Attach: the container had no better default routes than those by this link
	segment  *Segment
}

// Connect makes the endpoint's veth pair: one end on the bridge, the other, with the endpoint's MAC address, in the
// host's namespace, from where the engine takes it. If an earlier attempt left one, it is made anew.
func (s *Segment) Connect(ep usernet.Endpoint) (*Link, error) {
	l := s.Link(ep)
	if err := l.Close(); err != nil {
		return nil, err
	}
	if err := s.addPair(l, ep, end{l.PeerName, s.home}); err != nil {
		return nil, err
	}
	return l, s.forgetNeighbour(ep)
}

// end is where the container's end of a pair appears.
type end struct {
	name string
	ns   *netns.NS
}

// addPair makes a link's veth pair: the host's end is on the bridge and up, the other one is as it was born.
func (s *Segment) addPair(l *Link, ep usernet.Endpoint, to end) (err error) {
	la := netlink.NewLinkAttrs()
	la.Name = l.HostName
	la.MTU = s.network.MTU()
	la.MasterIndex = s.bridge
	veth := &netlink.Veth{
		LinkAttrs:        la,
		PeerName:         to.name,
		PeerHardwareAddr: ep.MAC,
		PeerNamespace:    netlink.NsFd(to.ns.Fd()),
		PeerMTU:          uint32(s.network.MTU()),
	}
	if err := s.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth %s with %s: %w", l.HostName, to.name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if !s.network.Options.ICC {
		// The bridge forwards nothing between isolated ports (IFLA_BRPORT_ISOLATED, Linux 4.18); needs no br_netfilter.
		if err := s.nl.LinkSetIsolated(veth, true); err != nil {
			return fmt.Errorf("isolate %s: %w", l.HostName, err)
		}
	}
	if err := s.nl.LinkSetUp(veth); err != nil {
		return fmt.Errorf("bring up %s: %w", l.HostName, err)
	}
	return nil
}

// forgetNeighbour makes the router forget whom it knew by the endpoint's addresses: they may have had another MAC address.
func (s *Segment) forgetNeighbour(ep usernet.Endpoint) error {
	for _, a := range []netip.Prefix{ep.Addr4, ep.Addr6} {
		if !a.IsValid() {
			continue
		}
		family := netlink.FAMILY_V4
		if a.Addr().Is6() {
			family = netlink.FAMILY_V6
		}
		err := s.nl.NeighDel(&netlink.Neigh{LinkIndex: s.bridge, Family: family, IP: a.Addr().AsSlice()})
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) { // EINVAL: the bridge has no IPv6
			return fmt.Errorf("forget neighbour %s: %w", a.Addr(), err)
		}
	}
	return nil
}

// Link is the link of an endpoint that was connected before, perhaps by an earlier process. Whether it still exists
// tells State.
func (s *Segment) Link(ep usernet.Endpoint) *Link {
	return &Link{HostName: ep.HostName(), PeerName: ep.PeerName(), segment: s}
}

// State asks the kernel where the link is.
func (l *Link) State() (State, error) {
	if _, err := l.segment.nl.LinkByName(l.HostName); err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return Gone, nil
		}
		return Gone, fmt.Errorf("find link %s: %w", l.HostName, err)
	}
	if _, err := netlink.LinkByName(l.PeerName); err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return Moved, nil
		}
		return Gone, fmt.Errorf("find link %s: %w", l.PeerName, err)
	}
	return Home, nil
}

// States is State for many endpoints at once, by their IDs.
func (s *Segment) States(eps []usernet.Endpoint) (map[string]State, error) {
	ports, err := linkNames(s.nl.LinkList)
	if err != nil {
		return nil, err
	}
	home, err := linkNames(netlink.LinkList)
	if err != nil {
		return nil, err
	}
	states := map[string]State{}
	for _, ep := range eps {
		switch {
		case !ports[ep.HostName()]:
			states[ep.ID] = Gone
		case home[ep.PeerName()]:
			states[ep.ID] = Home
		default:
			states[ep.ID] = Moved
		}
	}
	return states, nil
}

func linkNames(list func() ([]netlink.Link, error)) (map[string]bool, error) {
	links, err := dump.Whole(list)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	names := make(map[string]bool, len(links))
	for _, l := range links {
		names[l.Attrs().Name] = true
	}
	return names, nil
}

// Close deletes the pair, wherever its other end is, and what limits it. A pair that is gone is fine.
func (l *Link) Close() error {
	return errors.Join(l.closePair(), l.closeShaper())
}

func (l *Link) closePair() error {
	link, err := l.segment.nl.LinkByName(l.HostName)
	if err == nil {
		err = l.segment.nl.LinkDel(link)
	}
	if err == nil || errors.As(err, &netlink.LinkNotFoundError{}) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("delete veth %s: %w", l.HostName, err)
}

// Prune deletes the links on the bridge that belong to none of eps and that no container has: what a process left that
// was killed, and whose records are lost. A link that is in a container is left there.
func (s *Segment) Prune(eps []usernet.Endpoint) error {
	if s.foreign() {
		return nil
	}
	links, err := dump.Whole(s.nl.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var errs []error
	there := map[string]bool{}
	for _, link := range links {
		there[link.Attrs().Name] = true
	}
	for _, link := range links {
		if tail, ours := strings.CutPrefix(link.Attrs().Name, shaperPrefix); ours && link.Type() == "ifb" {
			if l := s.Link(usernet.Endpoint{ID: tail}); !there[l.HostName] {
				errs = append(errs, l.closeShaper())
			}
			continue
		}
		id, ours := strings.CutPrefix(link.Attrs().Name, usernet.Endpoint{}.HostName())
		known := func(ep usernet.Endpoint) bool { return ep.HostName() == link.Attrs().Name }
		if !ours || link.Attrs().MasterIndex != s.bridge || link.Type() != "veth" || slices.ContainsFunc(eps, known) {
			continue
		}
		l := s.Link(usernet.Endpoint{ID: id})
		state, err := l.State()
		if err == nil && state == Home {
			err = l.Close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// WatchHome calls gone whenever a container's end of a link has left the host's namespace, until ctx is done.
func WatchHome(ctx context.Context, gone func()) error {
	home, err := netns.Current()
	if err != nil {
		return err
	}
	defer home.Close()
	return watch(ctx, home, usernet.Endpoint{}.PeerName(), gone)
}

// watch calls gone when links whose name begins with prefix have vanished from ns, until ctx is done.
func watch(ctx context.Context, ns *netns.NS, prefix string, gone func()) error {
	for ctx.Err() == nil {
		// A subscription breaks when too much happens at once (ENOBUFS).
		if err := watchOnce(ctx, ns, prefix, gone); err != nil {
			return err
		}
	}
	return nil
}

func watchOnce(ctx context.Context, ns *netns.NS, prefix string, gone func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan netlink.LinkUpdate, 64)
	err := ns.Do(func() error { return netlink.LinkSubscribe(updates, ctx.Done()) })
	if err != nil {
		return fmt.Errorf("watch links: %w", err)
	}
	gone()                   // a deletion may have been missed until now
	for u := range updates { // closed when ctx is done
		// A bridge's port also "goes" in the family AF_BRIDGE, when it leaves the bridge.
		if u.Header.Type == unix.RTM_DELLINK && u.Family == unix.AF_UNSPEC && strings.HasPrefix(u.Link.Attrs().Name, prefix) {
			gone()
		}
	}
	return nil
}

// setSysctls sets what the bridge of a network of ours needs and leaves an adopted one alone.
func (s *Segment) setSysctls(bridge string) error {
	if s.adopted {
		return nil
	}
	disable := "1"
	for _, sub := range s.network.Subnets {
		if sub.Prefix.Addr().Is6() {
			disable = "0"
		}
	}
	return s.ns.Do(func() error {
		for _, set := range []struct{ key, value string }{
			{"disable_ipv6", disable},
			{"accept_ra", "0"}, // containers must not become our router
			{"accept_dad", "0"},
		} {
			err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", bridge, set.key), []byte(set.value), 0o644)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("set %s of %s: %w", set.key, bridge, err)
			}
		}
		return nil
	})
}
