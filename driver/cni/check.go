package cni

import (
	"context"
	"fmt"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/control"
)

// check compares a container with the result of its ADD, and with what the daemon has for it.
func (p *Plugin) check(ctx context.Context, a *skel.CmdArgs) error {
	w, err := decode(a.StdinData)
	if err != nil {
		return err
	}
	if len(w.Prev) == 0 {
		return invalid("prevResult is missing: there is nothing to compare with")
	}
	result, err := w.previous()
	if err != nil {
		return err
	}
	at := indexOf(result, a)
	if at < 0 {
		return differs("prevResult has no interface %s in a container", a.IfName)
	}
	wanted, err := ports(w.Runtime.PortMappings)
	if err != nil {
		return err
	}
	n, err := find(ctx, control.NewClient(p.Daemon.Socket), w)
	if err != nil {
		return err
	}
	if n == nil || n.Mode != usernet.Foreign {
		theirs, err := compareInside(a, result, at)
		switch {
		case err != nil:
			return err
		case theirs && n == nil && len(wanted) == 0:
			return nil // a plugin before us in the chain has made it, and nothing was left to do
		case theirs && n != nil:
			return differs("usernet has not made the interface %s", a.IfName)
		}
	}
	if err := compare(n, w, a, wanted, result.Interfaces[at].Mac); err != nil {
		return err
	}
	_, err = w.delegate(ctx, "CHECK", a.StdinData)
	return err
}

// compare tells how what the daemon has for a container differs from what is wanted of it.
func compare(n *control.Network, w wire, a *skel.CmdArgs, wanted []control.Port, mac string) error {
	switch {
	case n == nil:
		return differs("the daemon has no network %s", w.Name)
	case !n.Up:
		return differs("the network %s is down; the log of the daemon says why", w.Name)
	}
	i := slices.IndexFunc(n.Endpoints, func(e control.Endpoint) bool { return e.ID == endpointID(w.Name, a.ContainerID, a.IfName) })
	if i < 0 {
		return differs("the daemon does not know of the container on the network %s", w.Name)
	}
	e := n.Endpoints[i]
	if mac != "" && e.MAC != mac {
		return differs("the daemon has given the container the MAC address %s, not %s", e.MAC, mac)
	}
	if n.Internal {
		return nil // nothing is published there
	}
	for _, p := range wanted {
		if err := published(e, p); err != nil {
			return err
		}
	}
	return nil
}

// published tells why a port is not published. The daemon may have several that make up one: for each address family.
func published(e control.Endpoint, want control.Port) error {
	err := differs("port %d of the host is not published", want.HostPort)
	for _, p := range e.Ports {
		if p.Proto != want.Proto || p.HostPort != want.HostPort || p.ContainerPort != want.ContainerPort || want.HostIP.IsValid() && p.HostIP != want.HostIP {
			continue
		}
		if p.Error != "" {
			return differs("port %d of the host is not served: %s", want.HostPort, p.Error)
		}
		err = nil
	}
	return err
}

// find asks the daemon for a network; nil: it has none of that name.
func find(ctx context.Context, c *control.Client, w wire) (*control.Network, error) {
	all, err := c.Networks(ctx)
	if err != nil {
		return nil, fmt.Errorf("look at the network: %w", err)
	}
	i := slices.IndexFunc(all, func(n control.Network) bool { return n.ID == networkID(w.Name) })
	if i < 0 {
		return nil, nil
	}
	return &all[i], nil
}
