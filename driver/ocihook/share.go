package ocihook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/control"
)

// A container that joins a namespace where another one has an interface of ours shares it. The interface belongs to the
// one that it was made for, and goes with it; ports that the others publish go with these, at the latest with the interface.

// shared is what a container has published on the endpoint of another one. A file keeps it while the container runs.
type shared struct {
	Endpoint string         `json:"endpoint"`
	Ports    []control.Port `json:"ports"`
}

// sharedWith finds the endpoint of another container in the container's namespace: on the network that is wanted, or
// if no network is there of that name, the first one.
func sharedWith(there []control.Network, st state, w wish) (n control.Network, e control.Endpoint, ok bool) {
	for _, at := range there {
		for _, ep := range at.Endpoints {
			if isOurs(at) && isOf(st, ep) {
				continue // by an interface of another name
			}
			if !ok || at.ID == w.Network.ID {
				n, e, ok = at, ep, true
			}
		}
	}
	return n, e, ok
}

// share publishes the container's ports on the endpoint whose interface it shares, and leads it to the network's resolver.
func (h *Hook) share(ctx context.Context, c *control.Client, st state, b bundle, w wish, n control.Network, e control.Endpoint) error {
	if err := w.fits(n, e); err != nil {
		return fmt.Errorf("the network namespace is that of container %.64s: %w", e.ContainerID, err)
	}
	if err := h.resolver(st, b, w, control.Attached{DNS: n.DNS}); err != nil || len(w.Ports) == 0 {
		return err
	}
	had, err := h.sharedBefore(st)
	if err != nil {
		return err
	}
	if had.Endpoint == e.ID && len(had.Ports) > 0 && len(still(e, had.Ports)) == len(had.Ports) {
		return nil
	}
	var ports []usernet.Port
	for _, p := range w.Ports {
		ports = append(ports, p.Value())
	}
	got, err := c.AddPorts(ctx, e.ID, ports)
	if err != nil {
		return err
	}
	now := shared{Endpoint: e.ID}
	for _, p := range got {
		now.Ports = append(now.Ports, control.PortOf(p))
	}
	if err := h.setShared(st, now); err != nil {
		return errors.Join(err, c.RemovePorts(context.WithoutCancel(ctx), e.ID, got))
	}
	return nil
}

// fits refuses what a container that shares another one's interface cannot have.
func (w wish) fits(n control.Network, e control.Endpoint) error {
	if name := w.Network.Name; name != n.Name && w.named {
		return invalid("setting network=%.64s: the namespace is on network %.64s", name, n.Name)
	}
	for _, a := range w.Addresses {
		if a != e.IPv4.Addr() && a != e.IPv6.Addr() {
			return invalid("address %s: it has %s", a, addressesOf(e))
		}
	}
	if w.MAC != "" && w.MAC != e.MAC {
		return invalid("MAC address %.64s: it has %s", w.MAC, e.MAC)
	}
	if len(w.Container.Aliases) > 0 {
		return invalid("setting alias: names belong to the container whose namespace it is")
	}
	return nil
}

func addressesOf(e control.Endpoint) []netip.Addr {
	var as []netip.Addr
	for _, p := range []netip.Prefix{e.IPv4, e.IPv6} {
		if p.IsValid() {
			as = append(as, p.Addr())
		}
	}
	return as
}

// unshare releases the ports that the container has published on another one's endpoint.
func (h *Hook) unshare(ctx context.Context, c *control.Client, st state, all []control.Network) error {
	had, err := h.sharedBefore(st)
	if err != nil {
		return err
	}
	for _, n := range all {
		for _, e := range n.Endpoints {
			if e.ID != had.Endpoint {
				continue
			}
			if ports := still(e, had.Ports); len(ports) > 0 {
				if err := c.RemovePorts(ctx, e.ID, ports); err != nil {
					return err
				}
			}
		}
	}
	if err := os.Remove(h.sharedFile(st)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (h *Hook) sharedFile(st state) string { return filepath.Join(h.RunDir, containerKey(st)+".json") }

func (h *Hook) setShared(st state, now shared) error {
	text, err := json.Marshal(now)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(h.RunDir, 0o711); err != nil {
		return err
	}
	return os.WriteFile(h.sharedFile(st), text, 0o600)
}

// sharedBefore is what the container has published already; zero: nothing.
func (h *Hook) sharedBefore(st state) (had shared, err error) {
	text, err := os.ReadFile(h.sharedFile(st))
	if errors.Is(err, fs.ErrNotExist) {
		return shared{}, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &had)
	}
	if err != nil {
		return shared{}, fmt.Errorf("read what container %.64s has published: %w", st.ID, err)
	}
	return had, nil
}

// still are those of ports that an endpoint publishes.
func still(e control.Endpoint, ports []control.Port) []usernet.Port {
	var left []usernet.Port
	for _, p := range ports {
		same := func(x control.Port) bool {
			return x.Proto == p.Proto && x.HostIP == p.HostIP && x.HostPort == p.HostPort && x.ContainerPort == p.ContainerPort
		}
		if slices.ContainsFunc(e.Ports, same) {
			left = append(left, p.Value())
		}
	}
	return left
}
