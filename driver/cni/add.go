package cni

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/driver/held"
)

// adding is one ADD.
type adding struct {
	plugin *Plugin
	wire
	args   *skel.CmdArgs
	req    control.AttachRequest
	netns  *os.File         // the container's
	result *types100.Result // of the plugins before us in the chain, and then ours with it
}

// add puts a container on a network. Behind other plugins of a chain, it adds to what they made.
func (p *Plugin) add(ctx context.Context, a *skel.CmdArgs) (*types100.Result, error) {
	w, err := decode(a.StdinData)
	if err != nil {
		return nil, err
	}
	c := adding{plugin: p, wire: w, args: a}
	if c.result, err = w.previous(); err != nil {
		return nil, err
	}
	if c.req, err = request(w, a); err != nil {
		return nil, err
	}
	if c.netns, err = openContainer(a); err != nil {
		return nil, err
	}
	defer c.netns.Close()
	if c.req.Ports, err = heldPorts(a.ContainerID, c.req.Ports); err != nil {
		return nil, err
	}
	if indexOf(c.result, a) >= 0 {
		return c.result, c.foreign(ctx)
	}
	if err := vacant(c.netns, a.IfName); err != nil {
		return nil, err
	}
	if w.ipam() == dhcp {
		return c.result, c.late(ctx)
	}
	return c.result, c.usual(ctx)
}

// usual has the addresses chosen and then puts the container on the network.
func (c *adding) usual(ctx context.Context) (err error) {
	lease, err := c.lease(ctx, c.args.StdinData)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(coded(err), c.release(ctx, c.args.StdinData))
		}
	}()
	if lease != nil {
		if err := c.take(lease, &c.req); err != nil {
			return err
		}
	}
	got, err := c.attach(ctx)
	if err != nil {
		return err
	}
	extend(c.result, c.args, c.req, got)
	c.result.DNS = c.resolvers(c.result.DNS, lease, got)
	return nil
}

// attach asks the daemon.
func (c *adding) attach(ctx context.Context) (got control.Attached, err error) {
	err = c.plugin.Daemon.Ask(ctx, func(client *control.Client) (err error) {
		got, err = client.Attach(ctx, c.req, c.netns)
		return err
	})
	return got, err
}

// previous is the result of the plugins before this one in the chain.
func (w wire) previous() (*types100.Result, error) {
	if len(w.Prev) == 0 || string(w.Prev) == "null" {
		return &types100.Result{CNIVersion: types100.ImplementedSpecVersion}, nil
	}
	c := types.PluginConf{CNIVersion: w.CNIVersion}
	err := json.Unmarshal(w.Prev, &c.RawPrevResult)
	if err == nil {
		err = whole(w.Prev)
	}
	if err == nil {
		err = version.ParsePrevResult(&c)
	}
	if err != nil {
		return nil, failed(types.ErrDecodingFailure, "prevResult: %v", err)
	}
	result, err := types100.NewResultFromResult(c.PrevResult)
	if err != nil {
		return nil, failed(types.ErrDecodingFailure, "prevResult: %v", err)
	}
	return result, nil
}

// whole refuses a result with null in its lists, which package types would follow.
func whole(result []byte) error {
	var lists struct {
		Interfaces []*struct{} `json:"interfaces"`
		IPs        []*struct{} `json:"ips"`
		Routes     []*struct{} `json:"routes"`
	}
	if err := json.Unmarshal(result, &lists); err != nil {
		return err
	}
	if slices.Contains(slices.Concat(lists.Interfaces, lists.IPs, lists.Routes), nil) {
		return errors.New("null in a list")
	}
	return nil
}

// openContainer opens the container's network namespace.
func openContainer(a *skel.CmdArgs) (*os.File, error) {
	f, err := os.Open(a.Netns)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, failed(types.ErrUnknownContainer, "CNI_NETNS: %v", err)
	case err != nil:
		return nil, failed(types.ErrInvalidEnvironmentVariables, "CNI_NETNS: %v", err)
	}
	if own, err := ns.CheckNetNS(a.Netns); err == nil && own && !overridden(a) {
		f.Close()
		return nil, failed(types.ErrInvalidNetNS, "CNI_NETNS: %s is the plugin's own network namespace", a.Netns)
	}
	return f, nil
}

// overridden tells whether the runtime insists on the plugin's own namespace.
func overridden(a *skel.CmdArgs) bool {
	return a.NetnsOverride == "1" || strings.EqualFold(a.NetnsOverride, "true")
}

// vacant refuses a container that has an interface of that name.
func vacant(netns *os.File, ifName string) error {
	in, err := look(netns)
	if err != nil {
		return err
	}
	defer in.Close()
	link, err := in.link(ifName)
	if err == nil && link != nil {
		err = failed(codeExists, "the container has an interface %s already", ifName)
	}
	return err
}

// heldPorts marks the ports that rootful Podman has bound for the container, or will. It runs its plugins itself.
func heldPorts(containerID string, ports []control.Port) ([]control.Port, error) {
	if len(ports) == 0 || os.Geteuid() != 0 {
		return ports, nil
	}
	engine := os.Getppid()
	name, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(engine), "comm"))
	if err != nil || string(name) != "podman\n" {
		return ports, nil // others bind ports for themselves only
	}
	return held.Expected(containerID, engine, ports)
}

// extend adds to a result what a container has got.
func extend(result *types100.Result, a *skel.CmdArgs, req control.AttachRequest, got control.Attached) {
	if got.Bridge != "" {
		result.Interfaces = append(result.Interfaces, &types100.Interface{Name: got.Bridge}, &types100.Interface{Name: got.Link})
	}
	ours := len(result.Interfaces)
	result.Interfaces = append(result.Interfaces, &types100.Interface{Name: a.IfName, Mac: got.MAC, Mtu: got.MTU, Sandbox: a.Netns})
	defaults := map[bool]bool{}
	for _, at := range got.Addresses {
		result.IPs = append(result.IPs, &types100.IPConfig{
			Interface: types100.Int(ours), Address: ipNet(at.Address), Gateway: at.Gateway.AsSlice(),
		})
		is4 := at.Address.Addr().Is4()
		if req.NoDefault || req.Network.Internal || !at.Gateway.IsValid() || defaults[is4] {
			continue
		}
		defaults[is4] = true
		result.Routes = append(result.Routes, &types.Route{Dst: ipNet(netip.PrefixFrom(zero(is4), 0)), GW: at.Gateway.AsSlice()})
	}
	for _, r := range req.Routes {
		result.Routes = append(result.Routes, &types.Route{Dst: ipNet(r.Destination), GW: r.NextHop.AsSlice(), Priority: r.Metric})
	}
}

// resolvers are the name servers of a container: those that the runtime gives for it, else those of the configuration, of the
// IPAM plugin, or the network's own; before are those of the plugins before us.
func (w wire) resolvers(before types.DNS, lease *types100.Result, got control.Attached) types.DNS {
	d := w.DNS
	if d.IsEmpty() && lease != nil {
		d = lease.DNS
	}
	for _, r := range []struct {
		given []string
		to    *[]string
	}{{w.Runtime.DNS.Servers, &d.Nameservers}, {w.Runtime.DNS.Searches, &d.Search}, {w.Runtime.DNS.Options, &d.Options}} {
		if len(r.given) > 0 {
			*r.to = r.given
		}
	}
	if len(d.Nameservers) == 0 {
		for _, a := range got.DNS {
			d.Nameservers = append(d.Nameservers, a.String())
		}
		for _, s := range got.Search {
			if !slices.Contains(d.Search, s) {
				d.Search = append(d.Search, s)
			}
		}
	}
	if d.IsEmpty() {
		return before
	}
	return d
}
