package cni

import (
	"context"
	"encoding/json"
	"errors"
	"os"

	"github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/usernet/usernet/driver/control"
)

// del takes a container off a network. It succeeds with whatever is missing, and does not mind what is wrong with the
// configuration as long as it tells the network's name.
//
// A daemon is not started for it: one that comes later finds that the container is gone.
func (p *Plugin) del(ctx context.Context, a *skel.CmdArgs) error {
	var w wire
	if err := json.Unmarshal(a.StdinData, &w); err != nil && w.Name == "" {
		return failed(types.ErrDecodingFailure, "read the network's configuration: %v", err)
	}
	netns := containerToLeave(a)
	if netns != nil {
		defer netns.Close()
	}
	var released error
	if w.ipam() == dhcp { // it tells the server, by the interface
		released = w.release(ctx, a.StdinData)
	}
	err := control.NewClient(p.Daemon.Socket).Detach(ctx, networkID(w.Name), endpointID(w.Name, a.ContainerID, a.IfName), netns)
	if errors.Is(err, control.ErrAbsent) {
		err = removeLink(netns, a)
	}
	if err != nil || w.ipam() == dhcp {
		return errors.Join(coded(err), released)
	}
	return w.release(ctx, a.StdinData)
}

// containerToLeave opens the container's network namespace; nil: it is gone, or is not the container's.
func containerToLeave(a *skel.CmdArgs) *os.File {
	if own, err := ns.CheckNetNS(a.Netns); err != nil || own {
		return nil
	}
	f, err := os.Open(a.Netns)
	if err != nil {
		return nil
	}
	return f
}

// removeLink deletes a container's interface where no daemon does. The container may live on without it.
func removeLink(netns *os.File, a *skel.CmdArgs) error {
	if netns == nil {
		return nil
	}
	in, err := look(netns)
	if err != nil {
		return nil // what is no namespace has no links
	}
	defer in.Close()
	return in.remove(a.IfName)
}
