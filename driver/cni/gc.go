package cni

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/usernet/usernet/driver/control"
)

// collect takes those containers off a network that the runtime does not list.
func (p *Plugin) collect(ctx context.Context, a *skel.CmdArgs) error {
	w, err := decode(a.StdinData)
	if err != nil {
		return err
	}
	var errs []error
	err = p.Daemon.Ask(ctx, func(c *control.Client) error {
		n, err := find(ctx, c, w)
		if err != nil || n == nil {
			return err
		}
		for _, e := range n.Endpoints {
			attachment := types.GCAttachment{ContainerID: e.ContainerID, IfName: e.Interface}
			if !slices.Contains(w.Valid, attachment) {
				errs = append(errs, c.Detach(ctx, n.ID, e.ID, nil))
			}
		}
		return nil
	})
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	_, err = w.delegate(ctx, "GC", a.StdinData)
	return err
}

// status tells whether a container could be added now. It starts a daemon as ADD would.
func (p *Plugin) status(ctx context.Context, a *skel.CmdArgs) error {
	w, err := decode(a.StdinData)
	if err != nil {
		return err
	}
	spec, err := network(w)
	if err != nil {
		return err
	}
	var n *control.Network
	err = p.Daemon.Ask(ctx, func(c *control.Client) (err error) {
		n, err = find(ctx, c, w)
		return err
	})
	if err != nil {
		return p.unavailable(err)
	}
	if n != nil && !n.Up {
		return failed(types.ErrLimitedConnectivity, "the network %s is down; the log of the daemon says why", w.Name)
	}
	if n == nil {
		_, err := control.NewClient(p.Daemon.Socket).PrepareNetwork(ctx, control.PrepareRequest{Network: spec})
		if err != nil {
			return failed(types.ErrPluginNotAvailable, "%v", err)
		}
	}
	_, err = w.delegate(ctx, "STATUS", a.StdinData)
	return err
}

// unavailable tells what a missing daemon means. If there was one, the ports of containers are not served, and from networks of
// mode usermode nothing goes out.
func (p *Plugin) unavailable(err error) error {
	code := types.ErrPluginNotAvailable
	if _, gone := os.Stat(p.Daemon.Socket); gone == nil {
		code = types.ErrLimitedConnectivity
	}
	return failed(code, "%v", err)
}
