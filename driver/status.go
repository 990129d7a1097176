package driver

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/usermode"
)

// NetworkStatus is what is known of a network now.
type NetworkStatus struct {
	usernet.Network
	Name      string         // the engine's, if it told
	Up        bool           // false: it could not be brought back after a restart
	Path      string         // usermode: how TCP leaves: "splice" or "netstack"
	PathError string         // why it is netstack although the fast path was wanted
	Traffic   usermode.Stats // usermode: what it carries, and what it has turned away
	Endpoints []EndpointStatus

	Resolver      []netip.Addr // where containers ask for names; none: not here
	ResolverError string       // why not at all addresses where it was wanted
}

// EndpointStatus is what is known of an endpoint now.
type EndpointStatus struct {
	usernet.Endpoint
	Container Container // what the engine told of it
	Joined    bool      // a container has it
	Ports     []PortStatus
}

// PortStatus is one published port. Err is empty while it is served.
type PortStatus struct {
	usernet.Port
	Err       string
	Beyond    bool   // it is wanted on the host of this virtual machine as well
	BeyondErr string // why it is not had there
}

// Status lists all networks with their endpoints and published ports, in the order of their IDs.
func (d *Driver) Status() []NetworkStatus {
	var all []NetworkStatus
	for _, n := range d.all() {
		n.mu.Lock()
		if !n.dead {
			all = append(all, n.status())
		}
		n.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b NetworkStatus) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

func (n *network) status() NetworkStatus {
	s := NetworkStatus{Network: n.Network, Name: n.name, Up: n.segment != nil && !n.failed.Load()}
	if s.Up && n.Options.Mode == usernet.Usermode && !n.Internal {
		s.Traffic = n.segment.Gateway().Stats()
		s.Path = "netstack"
		fast, err := n.segment.Gateway().FastPath()
		if fast {
			s.Path = "splice"
		}
		if err != nil {
			s.PathError = err.Error()
		}
	}
	s.Resolver, s.ResolverError = n.names.listening(), n.names.problems()
	for _, c := range n.containers {
		es := EndpointStatus{Endpoint: c.Endpoint, Container: c.owner, Joined: c.joined}
		for _, p := range c.ports {
			ps := PortStatus{Port: p.Port}
			if p.forward == nil && p.err != nil {
				ps.Err = p.err.Error()
			}
			if p.beyond != nil {
				ps.Beyond = true
				if err := p.beyond.Err(); err != nil {
					ps.BeyondErr = err.Error()
				}
			}
			es.Ports = append(es.Ports, ps)
		}
		s.Endpoints = append(s.Endpoints, es)
	}
	slices.SortFunc(s.Endpoints, func(a, b EndpointStatus) int { return cmp.Compare(a.ID, b.ID) })
	return s
}

// FindEndpoint finds an endpoint by the beginning of its ID or its container's, by its container's name or by one of its
// addresses. It is an error if several fit.
func (d *Driver) FindEndpoint(_ context.Context, name string) (usernet.Endpoint, error) {
	var found []usernet.Endpoint
	for _, n := range d.Status() {
		for _, e := range n.Endpoints {
			if e.ID == name {
				return e.Endpoint, nil
			}
			if name != "" && (strings.HasPrefix(e.ID, name) || strings.HasPrefix(e.Container.ID, name) || e.Container.Name == name) || e.Addr4.IsValid() && e.Addr4.Addr().String() == name ||
				e.Addr6.IsValid() && e.Addr6.Addr().String() == name {
				found = append(found, e.Endpoint)
			}
		}
	}
	switch len(found) {
	case 0:
		return usernet.Endpoint{}, fmt.Errorf("endpoint %q: %w", name, usernet.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return usernet.Endpoint{}, fmt.Errorf("%w: endpoint %q fits %d endpoints", usernet.ErrInvalid, name, len(found))
}

// FindNetwork finds a network by its name or the beginning of its ID. It is an error if several fit.
func (d *Driver) FindNetwork(_ context.Context, name string) (usernet.Network, error) {
	var found []usernet.Network
	for _, n := range d.all() {
		if n.ID == name {
			return n.Network, nil
		}
		if name != "" && (strings.HasPrefix(n.ID, name) || n.name == name) {
			found = append(found, n.Network)
		}
	}
	switch len(found) {
	case 0:
		return usernet.Network{}, fmt.Errorf("network %q: %w", name, usernet.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return usernet.Network{}, fmt.Errorf("%w: network %q fits %d networks", usernet.ErrInvalid, name, len(found))
}
