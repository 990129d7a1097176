package libnetwork

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"sync"

	"github.com/usernet/usernet"
)

// fakeDriver keeps networks, endpoints and ports as a driver would, and sets nothing up.
type fakeDriver struct {
	mu        sync.Mutex
	networks  map[string]usernet.Network
	endpoints map[string]*fakeEndpoint
}

type fakeEndpoint struct {
	usernet.Endpoint
	sandbox string // "" when not joined
	ports   []usernet.Port
}

func newFake() *fakeDriver {
	return &fakeDriver{networks: make(map[string]usernet.Network), endpoints: make(map[string]*fakeEndpoint)}
}

func (d *fakeDriver) CreateNetwork(_ context.Context, n usernet.Network) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if old, exists := d.networks[n.ID]; exists && !reflect.DeepEqual(old, n) {
		return fmt.Errorf("network %s: %w", n.ID, usernet.ErrExists)
	}
	d.networks[n.ID] = n
	return nil
}

func (d *fakeDriver) DeleteNetwork(_ context.Context, networkID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, exists := d.networks[networkID]; !exists {
		return fmt.Errorf("network %s: %w", networkID, usernet.ErrNotFound)
	}
	delete(d.networks, networkID)
	return nil
}

func (d *fakeDriver) CreateEndpoint(_ context.Context, ep usernet.Endpoint) (usernet.Endpoint, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, exists := d.networks[ep.NetworkID]
	if !exists {
		return ep, fmt.Errorf("network %s: %w", ep.NetworkID, usernet.ErrNotFound)
	}
	if ep.MAC == nil {
		ep.MAC = net.HardwareAddr{2, 0x42, 0, 0, 0, byte(len(d.endpoints) + 1)}
	}
	for _, s := range n.Subnets {
		switch {
		case s.Prefix.Addr().Is4() && !ep.Addr4.IsValid():
			ep.Addr4 = netip.PrefixFrom(s.Gateway.Next(), s.Prefix.Bits())
		case s.Prefix.Addr().Is6() && !ep.Addr6.IsValid():
			ep.Addr6 = netip.PrefixFrom(s.Gateway.Next(), s.Prefix.Bits())
		}
	}
	d.endpoints[ep.ID] = &fakeEndpoint{Endpoint: ep}
	return ep, nil
}

func (d *fakeDriver) find(networkID, endpointID string) (*fakeEndpoint, error) {
	ep := d.endpoints[endpointID]
	if ep == nil || ep.NetworkID != networkID {
		return nil, fmt.Errorf("endpoint %s: %w", endpointID, usernet.ErrNotFound)
	}
	return ep, nil
}

func (d *fakeDriver) DeleteEndpoint(_ context.Context, networkID, endpointID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.find(networkID, endpointID); err != nil {
		return err
	}
	delete(d.endpoints, endpointID)
	return nil
}

func (d *fakeDriver) Join(_ context.Context, networkID, endpointID, sandboxKey string) (usernet.Attachment, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ep, err := d.find(networkID, endpointID)
	if err != nil {
		return usernet.Attachment{}, err
	}
	ep.sandbox = sandboxKey
	a := usernet.Attachment{SrcName: ep.PeerName(), DstPrefix: "eth", DstName: ep.IfName}
	n := d.networks[networkID]
	if n.Internal {
		return a, nil
	}
	if s, ok := n.SubnetOf(ep.Addr4.Addr()); ok {
		a.Gateway4 = s.Gateway
	}
	if s, ok := n.SubnetOf(ep.Addr6.Addr()); ok {
		a.Gateway6 = s.Gateway
	}
	return a, nil
}

func (d *fakeDriver) Leave(_ context.Context, networkID, endpointID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	ep, err := d.find(networkID, endpointID)
	if err != nil {
		return err
	}
	ep.sandbox, ep.ports = "", nil
	return nil
}

func (d *fakeDriver) Publish(_ context.Context, networkID, endpointID string, ports []usernet.Port) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	ep, err := d.find(networkID, endpointID)
	if err != nil {
		return err
	}
	for _, other := range d.endpoints {
		if other == ep {
			continue
		}
		for _, p := range other.ports {
			if slices.Contains(ports, p) && p.HostPort != 0 {
				return fmt.Errorf("publish %s: %w", p, usernet.ErrPortTaken)
			}
		}
	}
	ep.ports = ports
	return nil
}

func (d *fakeDriver) Unpublish(_ context.Context, networkID, endpointID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	ep, err := d.find(networkID, endpointID)
	if err != nil {
		return err
	}
	ep.ports = nil
	return nil
}

// ports is what the endpoint publishes, nil if it does not exist.
func (d *fakeDriver) ports(endpointID string) []usernet.Port {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ep := d.endpoints[endpointID]; ep != nil {
		return ep.ports
	}
	return nil
}

func (d *fakeDriver) state() (networks, endpoints []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.networks)), slices.Sorted(maps.Keys(d.endpoints))
}
