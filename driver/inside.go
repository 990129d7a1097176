package driver

import (
	"cmp"
	"context"
	"slices"

	"github.com/usernet/usernet/internal/netns"
)

// StatusIn is Status of the endpoints only that have their interface in a namespace: what its container is on.
func (d *Driver) StatusIn(_ context.Context, ns *netns.NS) ([]NetworkStatus, error) {
	var found []NetworkStatus
	for _, n := range d.all() {
		s, err := n.statusIn(ns)
		if err != nil {
			return nil, err
		}
		if len(s.Endpoints) > 0 {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b NetworkStatus) int { return cmp.Compare(a.ID, b.ID) })
	return found, nil
}

func (n *network) statusIn(ns *netns.NS) (NetworkStatus, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dead || n.segment == nil || len(n.containers) == 0 {
		return NetworkStatus{}, nil
	}
	inside, err := n.segment.Inside(ns, n.endpoints())
	if err != nil || len(inside) == 0 {
		return NetworkStatus{}, err
	}
	s := n.status()
	s.Endpoints = slices.DeleteFunc(s.Endpoints, func(e EndpointStatus) bool { return !inside[e.ID] })
	return s, nil
}
