package endpoint

import (
	"fmt"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/dump"
	"github.com/usernet/usernet/internal/netns"
)

// Inside returns those of eps whose containers' ends are in ns, by their IDs. It asks the kernel, which tells of each veth in
// which namespace its peer is (IFLA_LINK_NETNSID); nothing that a container does to its interface changes that.
func (s *Segment) Inside(ns *netns.NS, eps []usernet.Endpoint) (map[string]bool, error) {
	// A namespace is numbered when a list first mentions it, so the list comes before the question.
	links, err := dump.Whole(s.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	number, err := s.nl.GetNetNsIdByFd(ns.Fd())
	if err != nil {
		return nil, fmt.Errorf("find the number of a namespace: %w", err)
	}
	if number < 0 { // no link leads there
		return nil, nil
	}
	names := map[string]bool{}
	for _, l := range links {
		if _, veth := l.(*netlink.Veth); veth && l.Attrs().NetNsID == number {
			names[l.Attrs().Name] = true
		}
	}
	inside := map[string]bool{}
	for _, ep := range eps {
		if names[ep.HostName()] {
			inside[ep.ID] = true
		}
	}
	return inside, nil
}
