package ocihook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"text/tabwriter"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver/control"
)

// Netns is the program netns of genuinetools, a hook for one bridge network, by its commands. Its containers say nothing in
// annotations.
type Netns struct {
	Bridge    string
	Address   string // of the bridge, with its subnet's mask
	MTU       int    // bytes; 0 means 1500
	Interface string // in the containers
	StaticIP  string // the container's address; "" leaves it to the daemon
	IPFile    string // where the container's address is written; relative paths begin at the bundle
	Daemon    control.Daemon
	RunDir    string
	Stdin     io.Reader
	Stdout    io.Writer
}

// Hook is the program without a command: a container is put on the network, or, at its end, taken off.
func (n *Netns) Hook(ctx context.Context) error {
	h := &Hook{Daemon: n.Daemon, RunDir: n.RunDir}
	st, err := decodeState(n.Stdin)
	if err != nil {
		return err
	}
	ipFile := n.IPFile
	if !filepath.IsAbs(ipFile) {
		ipFile = filepath.Join(st.Bundle, ipFile)
	}
	if st.ended() {
		if err := os.Remove(ipFile); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return h.release(ctx, st)
	}
	st.Annotations = nil
	s, err := n.settings()
	if err != nil {
		return err
	}
	w, err := s.wish(st, bundle{})
	if err != nil {
		return err
	}
	w.Names = false // its containers have a resolv.conf of their own
	got, err := h.attach(ctx, st, bundle{}, w)
	if err != nil || len(got.Addresses) == 0 {
		return err
	}
	return os.WriteFile(ipFile, []byte(got.Addresses[0].Address.Addr().String()), 0o644)
}

// settings say what the flags say. A bridge that is there has its own address and MTU, whatever the flags are.
func (n *Netns) settings() (settings, error) {
	gateway, mtu, err := n.network()
	if err != nil {
		return nil, err
	}
	return settings{
		"network": n.Bridge, "mode": string(usernet.Bridge), "bridge": n.Bridge,
		"subnet": gateway.Masked().String(), "gateway": gateway.Addr().String(), "mtu": strconv.Itoa(mtu),
		"interface": n.Interface, "ip": n.StaticIP, "resolv_conf": resolvOff,
	}, nil
}

// network is the address and the MTU of the bridge, or what they are to be.
func (n *Netns) network() (gateway netip.Prefix, mtu int, err error) {
	if n.Bridge == "" {
		return gateway, 0, invalid("bridge: name cannot be empty")
	}
	if n.Address == "" {
		return gateway, 0, invalid("bridge %s: ip address cannot be empty", n.Bridge)
	}
	if err := config.LinkName(n.Bridge); err != nil {
		return gateway, 0, err
	}
	if gateway, err = netip.ParsePrefix(n.Address); err != nil || !gateway.Addr().Is4() {
		return gateway, 0, invalid("bridge %s: address %.64q: want one such as 172.19.0.1/16", n.Bridge, n.Address)
	}
	if mtu = n.MTU; mtu < 1 {
		mtu = 1500
	}
	link, err := netlink.LinkByName(n.Bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return gateway, mtu, nil
	}
	if err != nil {
		return gateway, 0, fmt.Errorf("find bridge %s: %w", n.Bridge, err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return gateway, 0, fmt.Errorf("list addresses of %s: %w", n.Bridge, err)
	}
	if len(addrs) > 0 {
		a, _ := netip.AddrFromSlice(addrs[0].IP)
		ones, _ := addrs[0].Mask.Size()
		gateway = netip.PrefixFrom(a.Unmap(), ones)
	}
	return gateway, link.Attrs().MTU, nil
}

// Create makes the bridge, which then stays until Remove; the hook's own goes with its last container.
func (n *Netns) Create() error {
	gateway, mtu, err := n.network()
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(n.Bridge)
	switch {
	case err == nil && link.Type() != "bridge":
		return fmt.Errorf("%w: the link %s is there and is a %s, not a bridge", usernet.ErrExists, n.Bridge, link.Type())
	case err != nil:
		la := netlink.NewLinkAttrs()
		la.Name, la.MTU = n.Bridge, mtu
		link = &netlink.Bridge{LinkAttrs: la}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("add bridge %s: %w", n.Bridge, err)
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: gateway.Addr().AsSlice(), Mask: net.CIDRMask(gateway.Bits(), 32)}}
		err := netlink.AddrAdd(link, addr)
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("add %s to bridge %s: %w", gateway, n.Bridge, err), netlink.LinkDel(link))
		}
	}
	_, err = fmt.Fprintf(n.Stdout, "created bridge: %s\n", n.Bridge)
	return err
}

// Remove deletes the bridge. It refuses while containers are on it.
func (n *Netns) Remove(ctx context.Context) error {
	if n.Bridge == "" {
		return invalid("bridge: name cannot be empty")
	}
	removed := false
	c := control.NewClient(n.Daemon.Socket)
	all, err := c.Networks(ctx)
	if err != nil && !errors.Is(err, control.ErrAbsent) {
		return err
	}
	for _, net := range all {
		if net.ID != networkID(n.Bridge) {
			continue
		}
		if err := c.RemoveNetwork(ctx, net.ID); err != nil {
			return err
		}
		removed = true
	}
	link, err := netlink.LinkByName(n.Bridge)
	if err == nil && link.Type() != "bridge" {
		return invalid("link %s: it is a %s, not a bridge", n.Bridge, link.Type())
	}
	if err == nil {
		err = netlink.LinkDel(link)
	} else if removed {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("delete bridge %s: %w", n.Bridge, err)
	}
	_, err = fmt.Fprintf(n.Stdout, "deleted bridge: %s\n", n.Bridge)
	return err
}

// List prints the network's containers.
func (n *Netns) List(ctx context.Context) error {
	c := control.NewClient(n.Daemon.Socket)
	all, err := c.Networks(ctx)
	if err != nil && !errors.Is(err, control.ErrAbsent) {
		return err
	}
	i := slices.IndexFunc(all, func(net control.Network) bool { return net.ID == networkID(n.Bridge) })
	var eps []control.Endpoint
	processes := map[string]process{}
	if i >= 0 {
		eps = all[i].Endpoints
		if processes, err = findProcesses(ctx, c); err != nil {
			return err
		}
	}
	slices.SortFunc(eps, func(a, b control.Endpoint) int { return a.IPv4.Addr().Compare(b.IPv4.Addr()) })
	w := tabwriter.NewWriter(n.Stdout, 20, 1, 3, ' ', 0)
	fmt.Fprint(w, "IP\tLOCAL VETH\tPID\tSTATUS\tNS FD\n")
	for _, e := range eps {
		p, status := processes[e.ID], "running"
		if p.pid == 0 {
			p.fd, status = -1, "destroyed"
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%d\n", e.IPv4.Addr(), usernet.Endpoint{ID: e.ID}.HostName(), p.pid, status, p.fd)
	}
	return w.Flush()
}

// process is the first process in the namespace of an endpoint.
type process struct {
	pid int
	fd  int // under which the namespace was looked at
}

// findProcesses finds the containers' processes: the daemon knows namespaces only, and a container's first process has the lowest
// number in it.
func findProcesses(ctx context.Context, c *control.Client) (map[string]process, error) {
	paths, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return nil, err
	}
	pids := map[string]int{} // by their namespace
	for _, path := range paths {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(path))))
		if err != nil {
			continue
		}
		ns, err := os.Readlink(path)
		if err != nil {
			continue // it has ended
		}
		if old, seen := pids[ns]; !seen || pid < old {
			pids[ns] = pid
		}
	}
	found := map[string]process{}
	for _, pid := range pids {
		if err := findEndpoints(ctx, c, pid, found); err != nil {
			return nil, err
		}
	}
	return found, nil
}

func findEndpoints(ctx context.Context, c *control.Client, pid int, found map[string]process) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil // it has ended
	}
	defer f.Close()
	nets, err := c.NetworksIn(ctx, f)
	for _, net := range nets {
		for _, e := range net.Endpoints {
			found[e.ID] = process{pid, int(f.Fd())}
		}
	}
	return err
}
