// Package hostnet watches the host's links for bridges that belong to other container engines, and their addresses.
// It only looks; what follows from it is the firewall's and the gateway's business.
package hostnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/dump"
)

// settle is how long Run lets events gather before it looks: a container that starts is a dozen of them.
const settle = 20 * time.Millisecond

// Bridge is a bridge of somebody else's that containers or virtual machines are on.
type Bridge struct {
	Name     string
	Prefixes []netip.Prefix // masked; link-local ones are left out, for every link has them
}

func (b Bridge) equal(o Bridge) bool { return b.Name == o.Name && slices.Equal(b.Prefixes, o.Prefixes) }

// Watcher knows the other container bridges of the network namespace that its Run runs in.
type Watcher struct {
	ours func(name string) bool
	now  atomic.Pointer[snapshot]
}

// snapshot is what was seen at one time. It is never changed.
type snapshot struct {
	bridges  []Bridge // by name
	prefixes []netip.Prefix
	own      map[netip.Addr]bool // the host's own addresses
}

// New makes a Watcher that leaves out the bridges that ours names. The answer is asked for whenever a link or an
// address changes, so ours must know a bridge before it is made.
func New(ours func(name string) bool) *Watcher {
	w := &Watcher{ours: ours}
	w.now.Store(&snapshot{})
	return w
}

// Run watches until ctx is done, and then returns nil. It calls changed when it has looked for the first time, and
// whenever Bridges has another answer than before; never twice at a time.
func (w *Watcher) Run(ctx context.Context, changed func()) error {
	// Subscribing before looking: what happens in between is an event.
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return fmt.Errorf("subscribe to link events: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	events := make(chan struct{}, 1)
	g.Go(func() error {
		<-ctx.Done()
		s.Close() // ends a blocked receive
		return nil
	})
	g.Go(func() error { return receive(ctx, s, events) })
	g.Go(func() error { return w.follow(ctx, events, changed) })
	return g.Wait()
}

// receive turns messages into events, of which one at most is pending. What a message says does not matter: looking
// anew costs two dumps, and cannot get out of step.
func receive(ctx context.Context, s *nl.NetlinkSocket, events chan<- struct{}) error {
	for {
		_, _, err := s.Receive()
		if ctx.Err() != nil {
			return nil
		}
		// ENOBUFS: more happened than the socket could hold. What was lost does not matter either, and the socket
		// goes on.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("receive link events: %w", err)
		}
		select {
		case events <- struct{}{}:
		default:
		}
	}
}

// follow looks at once and after every event.
func (w *Watcher) follow(ctx context.Context, events <-chan struct{}, changed func()) error {
	for first := true; ; first = false {
		news, err := w.look()
		if err != nil {
			return err
		}
		if news || first {
			changed()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-events:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
		// What came in meanwhile is in what the next look sees.
		select {
		case <-events:
		default:
		}
	}
}

// look takes a new snapshot and reports whether the bridges are others than before.
func (w *Watcher) look() (news bool, err error) {
	links, err := dump.Whole(netlink.LinkList)
	if err != nil {
		return false, fmt.Errorf("list links: %w", err)
	}
	addrs, err := dump.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return false, fmt.Errorf("list addresses: %w", err)
	}
	s := evaluate(links, addrs, w.ours)
	old := w.now.Swap(s)
	return !slices.EqualFunc(old.bridges, s.bridges, Bridge.equal), nil
}

// evaluate is the pure part: which links are bridges of others, and where they are.
func evaluate(links []netlink.Link, addrs []netlink.Addr, ours func(string) bool) *snapshot {
	uplinked := map[int]bool{} // bridges with a port that leads out of the machine, by index
	for _, l := range links {
		if master := l.Attrs().MasterIndex; master != 0 && !virtual(l.Type()) {
			uplinked[master] = true
		}
	}
	s := &snapshot{own: map[netip.Addr]bool{}}
	prefixes := map[int][]netip.Prefix{}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		ip = ip.Unmap()
		s.own[ip] = true
		if ones, _ := a.Mask.Size(); !ip.IsLinkLocalUnicast() {
			prefixes[a.LinkIndex] = append(prefixes[a.LinkIndex], netip.PrefixFrom(ip, ones).Masked())
		}
	}
	for _, l := range links {
		a := l.Attrs()
		if l.Type() != "bridge" || uplinked[a.Index] || ours(a.Name) {
			continue
		}
		ps := prefixes[a.Index]
		slices.SortFunc(ps, func(a, b netip.Prefix) int {
			return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits())
		})
		ps = slices.Compact(ps)
		s.bridges = append(s.bridges, Bridge{a.Name, ps})
		s.prefixes = append(s.prefixes, ps...)
	}
	slices.SortFunc(s.bridges, func(a, b Bridge) int { return cmp.Compare(a.Name, b.Name) })
	return s
}

// virtual tells whether a bridge port of the kind, as package netlink calls it ("device" is hardware, "tuntap" a TAP),
// ends in a container, a virtual machine or a tunnel. Anything else, also a bond or a VLAN on a network card, is taken
// for a way to the LAN.
func virtual(kind string) bool {
	switch kind {
	case "veth", "tuntap", "dummy", "vxlan", "geneve":
		return true
	}
	return false
}

// Bridges returns the other container bridges, by name. The caller must not change it.
func (w *Watcher) Bridges() []Bridge { return w.now.Load().bridges }

// Contains tells whether a is in the address range of another container bridge and is not an address of the host
// itself. It is cheap enough for every new flow.
func (w *Watcher) Contains(a netip.Addr) bool {
	s := w.now.Load()
	a = a.Unmap().WithZone("")
	for _, p := range s.prefixes {
		if p.Contains(a) {
			return !s.own[a]
		}
	}
	return false
}
