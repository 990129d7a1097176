package endpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/dump"
	"github.com/usernet/usernet/internal/netns"
)

// Place says what a container's end of a link becomes in the container, for engines that leave this to their drivers. (Docker
// does it itself.)
type Place struct {
	Netns     *netns.NS      // the container's; open until Attach returns
	Addresses []netip.Prefix // with the masks of their subnets
	Gateways  []netip.Addr   // default routes, at most one of each family
	Metric    int            // of the default routes; 0: FirstMetric, or one above that of the container's others
	Routes    []Route
	Limits    Limits // of what the container sends and receives
}

// Route is a route that is wanted in a container.
type Route struct {
	Destination netip.Prefix
	NextHop     netip.Addr // zero: Kind says what happens to packets
	Metric      int
	Kind        int // 0, or RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT of rtnetlink(7)
}

// FirstMetric is that of the default route by a container's first network, unless another one is asked for. It is above
// netavark's 100: with two default routes of one metric the kernel would change between them (fib_select_default), and
// what is sent from netavark's addresses would go astray.
const FirstMetric = 101

// Alias is the alias of a container's interface that Attach has made.
const Alias = "usernet"

// tableOffset plus an interface's index is the number of the route table that belongs to the interface, in its
// container. It is the beginning of "usn" as a number: nobody else's.
const tableOffset = 0x75736e00

// Attach makes the endpoint's veth pair with the container's end in p.Netns, where it gets the endpoint's name and
// MAC address and all that p says, and is up when Attach returns. If an earlier attempt left a pair, it is made anew.
//
// What the container sends from one of the addresses leaves by this link, whatever the container's other networks make of
// its default route: answers to published ports go back where the question came from. That needs policy routing;
// a kernel without it has to do without.
func (s *Segment) Attach(ep usernet.Endpoint, p Place) (_ *Link, err error) {
	l := s.Link(ep)
	if s.foreign() {
		return l, nil
	}
	if err := l.Close(); err != nil {
		return nil, err
	}
	if err := s.addPair(l, ep, end{ep.IfName, p.Netns}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if err := s.limit(l, p.Limits); err != nil {
		return nil, err
	}
	in, err := handleIn(p.Netns)
	if err != nil {
		return nil, fmt.Errorf("open netlink in the container: %w", err)
	}
	defer in.Close()
	if l.First, err = place(in, ep.IfName, p); err != nil {
		return nil, err
	}
	if err := s.forgetNeighbour(ep); err != nil {
		return nil, err
	}
	return l, s.settle(l)
}

// place configures the container's end. It reports whether the container's default routes are those of this network.
func place(in *netlink.Handle, name string, p Place) (first bool, err error) {
	link, err := in.LinkByName(name)
	if err != nil {
		return false, fmt.Errorf("find %s in the container: %w", name, err)
	}
	if err := p.Netns.Do(func() error { return announce(name) }); err != nil {
		return false, err
	}
	if err := up(in, "lo"); err != nil {
		return false, err
	}
	if err := in.LinkSetAlias(link, Alias); err != nil {
		return false, fmt.Errorf("mark %s in the container: %w", name, err)
	}
	for _, a := range p.Addresses {
		if err := in.AddrAdd(link, addr(a)); err != nil {
			return false, fmt.Errorf("add %s to %s: %w", a, name, err)
		}
	}
	if err := in.LinkSetUp(link); err != nil {
		return false, fmt.Errorf("bring up %s in the container: %w", name, err)
	}
	for _, r := range p.Routes {
		// A route that needs no link may be left from a namespace's earlier turn.
		if err := in.RouteAppend(r.kernel(link)); err != nil && (r.Kind == 0 || !errors.Is(err, unix.EEXIST)) {
			return false, fmt.Errorf("add route to %s by %s: %w", r.Destination, name, err)
		}
	}
	first = true
	for _, gw := range p.Gateways {
		others, err := metrics(in, gw)
		if err != nil {
			return false, err
		}
		metric := p.Metric
		if metric == 0 {
			metric = FirstMetric
			if len(others) > 0 {
				metric = max(metric, others[len(others)-1]+1)
			}
		}
		first = first && (len(others) == 0 || metric < others[0])
		r := Route{Destination: netip.PrefixFrom(zero(gw), 0), NextHop: gw, Metric: metric}
		if err := in.RouteAppend(r.kernel(link)); err != nil {
			return false, fmt.Errorf("add default route by %s: %w", gw, err)
		}
		if err := routeBack(in, link, gw, p.Addresses); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return false, err
		}
	}
	return first, nil
}

// metrics are those of the default routes of a family that the container has, in order.
func metrics(in *netlink.Handle, gw netip.Addr) ([]int, error) {
	family := netlink.FAMILY_V4
	if gw.Is6() {
		family = netlink.FAMILY_V6
	}
	def := &netlink.Route{Dst: ipNet(netip.PrefixFrom(zero(gw), 0)), Table: unix.RT_TABLE_MAIN}
	routes, err := dump.Whole(func() ([]netlink.Route, error) {
		return in.RouteListFiltered(family, def, netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list default routes in the container: %w", err)
	}
	var ms []int
	for _, r := range routes {
		ms = append(ms, r.Priority)
	}
	slices.Sort(ms)
	return ms, nil
}

// announce makes the kernel tell the neighbours about an interface's addresses when it comes up, and believe none that
// wants to be its router.
func announce(name string) error {
	for _, s := range []struct{ path, value string }{
		{"ipv4/conf/" + name + "/arp_notify", "1"},
		{"ipv6/conf/" + name + "/ndisc_notify", "1"},
		{"ipv6/conf/" + name + "/accept_ra", "0"},
	} {
		err := os.WriteFile("/proc/sys/net/"+s.path, []byte(s.value), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("set net/%s: %w", s.path, err)
		}
	}
	return nil
}

func up(in *netlink.Handle, name string) error {
	link, err := in.LinkByName(name)
	if err == nil {
		err = in.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("bring up %s in the container: %w", name, err)
	}
	return nil
}

// routeBack gives the interface a route table of its own, for what is sent from its addresses.
func routeBack(in *netlink.Handle, link netlink.Link, gw netip.Addr, addresses []netip.Prefix) error {
	table := tableOffset + link.Attrs().Index
	def := Route{Destination: netip.PrefixFrom(zero(gw), 0), NextHop: gw}.kernel(link)
	def.Table = table
	if err := in.RouteReplace(def); err != nil {
		return fmt.Errorf("add default route by %s to table %d: %w", gw, table, err)
	}
	for _, a := range addresses {
		if a.Addr().Is4() != gw.Is4() {
			continue
		}
		near := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(a.Masked()), Scope: netlink.SCOPE_LINK, Table: table}
		if err := in.RouteReplace(near); err != nil {
			return fmt.Errorf("add route to %s to table %d: %w", a.Masked(), table, err)
		}
		if err := in.RuleAdd(backRule(a.Addr(), table)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule from %s: %w", a.Addr(), err)
		}
	}
	return nil
}

func backRule(from netip.Addr, table int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family = netlink.FAMILY_V4
	if from.Is6() {
		r.Family = netlink.FAMILY_V6
	}
	r.Src = ipNet(netip.PrefixFrom(from, from.BitLen()))
	r.Table = table
	r.Priority = 32765 // just before the main table
	return r
}

// Detach deletes the endpoint's veth pair and what Attach left beside it in the container's namespace: rules, and routes
// that need no link. A nil p.Netns is gone, and took that with it.
func (s *Segment) Detach(ep usernet.Endpoint, p Place) error {
	if err := s.Link(ep).Close(); err != nil || p.Netns == nil {
		return err
	}
	in, err := handleIn(p.Netns)
	if err != nil {
		return fmt.Errorf("open netlink in the container: %w", err)
	}
	defer in.Close()
	for _, r := range p.Routes {
		if r.Kind == 0 {
			continue
		}
		if err := in.RouteDel(r.kernel(nil)); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete route to %s: %w", r.Destination, err)
		}
	}
	for _, a := range p.Addresses {
		if err := deleteBackRules(in, a.Addr()); err != nil {
			return err
		}
	}
	return nil
}

func deleteBackRules(in *netlink.Handle, from netip.Addr) error {
	rule := backRule(from, 0)
	rules, err := in.RuleListFiltered(rule.Family, rule, netlink.RT_FILTER_SRC|netlink.RT_FILTER_PRIORITY)
	if err != nil {
		return fmt.Errorf("list rules in the container: %w", err)
	}
	for _, r := range rules {
		if r.Table <= tableOffset {
			continue
		}
		if err := in.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete rule from %s: %w", from, err)
		}
	}
	return nil
}

func (r Route) kernel(link netlink.Link) *netlink.Route {
	k := &netlink.Route{Dst: ipNet(r.Destination), Priority: r.Metric, Type: r.Kind}
	if r.Kind == 0 {
		k.LinkIndex, k.Gw = link.Attrs().Index, r.NextHop.AsSlice()
	}
	return k
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func zero(a netip.Addr) netip.Addr {
	if a.Is6() {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}
