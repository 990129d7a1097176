package doctor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// tun opens the driver's file, which makes no device yet, and then asks the trial.
func (m *machine) tun(ctx context.Context) (f finding, ok bool) {
	defer func() { f.essential = true }()
	file, err := os.OpenFile(m.tunPath, os.O_RDWR|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fix(m.sudo("modprobe tun"), Missing,
			"there is no %s, which carries containers' traffic. In a container, start that with --device %[1]s instead.", m.tunPath)
	case errors.Is(err, unix.EACCES):
		return fix(m.sudo("chmod 0666 "+m.tunPath), Missing,
			"you may not open %s, which carries containers' traffic. It is harmless to let everybody open it, and usual.", m.tunPath)
	case errors.Is(err, unix.EPERM):
		return say(Missing, "this container may not open %s: start it with --device %[1]s.", m.tunPath)
	case err != nil:
		return say(Missing, "it does not open, so containers would not reach the world: %v.", err)
	}
	file.Close()
	if why, _ := m.ownRights(ctx).failed(tryTUN); why != "" {
		return say(Missing, "%s opens, but no device can be made: %s.", m.tunPath, why)
	}
	return say(OK, "%s opens: usernet can carry containers' traffic.", m.tunPath)
}

func (m *machine) offload(ctx context.Context) (finding, bool) {
	why, tried := m.ownRights(ctx).failed(tryOffload)
	switch {
	case !tried:
		return silence()
	case why != "":
		return say(Warning, "this kernel refuses them on TUN devices (%s): UDP, and TCP without the fast path, are slower.", why)
	}
	return say(OK, "they cross the TUN device whole, which is fast.")
}

func (m *machine) nftables(ctx context.Context) (finding, bool) {
	why, tried := m.ownRights(ctx).failed(tryNftables)
	switch {
	case !tried:
		return silence()
	case why != "":
		return fix(m.sudo("modprobe nf_tables"), Warning,
			"the kernel lacks it (%s): containers see their gateway as the client of published ports, and TCP is slower.", why)
	}
	return say(OK, "usernet can set rules inside its own networks.")
}

// either is how the first of the experiments that failed did so. It is not tried if the first of them was not.
func (t trialResult) either(names ...string) (why string, tried bool) {
	for i, name := range names {
		w, tr := t.failed(name)
		if i == 0 {
			tried = tr
		}
		if why == "" {
			why = w
		}
	}
	return why, tried
}

func (m *machine) transparent(ctx context.Context) (finding, bool) {
	why, tried := m.ownRights(ctx).either(trySocket, trySource)
	switch {
	case !tried:
		return silence()
	case why != "":
		return fix(m.sudo("modprobe nft_socket"), Warning, "containers see their gateway as the client of published ports: %s.", why)
	}
	return say(OK, "containers see who connects to their published ports.")
}

func (m *machine) fastPath(ctx context.Context) (finding, bool) {
	why, tried := m.ownRights(ctx).either(tryTProxy, tryFast)
	switch {
	case !tried:
		return silence()
	case why != "":
		return fix(m.sudo("modprobe nft_tproxy"), Warning, "containers' TCP goes through usernet instead of staying in the kernel: %s.", why)
	}
	return say(OK, "containers' TCP stays in the kernel (TPROXY and splice).")
}

func (m *machine) iptables(ctx context.Context) (finding, bool) {
	return m.tables(ctx, "iptables", tryIptables, "networks of mode bridge need it (the others do not)")
}

func (m *machine) ip6tables(ctx context.Context) (finding, bool) {
	return m.tables(ctx, "ip6tables", tryIP6tables, "networks of mode bridge have no IPv6 without it")
}

// tables is about one of the programs of the package iptables.
func (m *machine) tables(ctx context.Context, name, experiment, without string) (finding, bool) {
	path, ok := m.find(name)
	if !ok {
		return fix(m.install("iptables"), Warning, "not installed: %s.", without)
	}
	text, err := m.run(ctx, path, "--version")
	if err != nil {
		return fix(m.install("iptables"), Warning, "it does not run (%v): %s.", err, without)
	}
	version := strings.TrimPrefix(firstLine(text), name+" ")
	switch why, tried := m.ownRights(ctx).failed(experiment); {
	case !tried:
		return say(Info, "%s. Whether the kernel takes its rules could not be tried.", version)
	case why != "" && strings.Contains(version, "legacy"):
		return fix(m.sudo("modprobe -a "+strings.TrimSuffix(name, "s")+"_nat "+strings.TrimSuffix(name, "s")+"_mangle"), Warning,
			"%s, but the kernel does not take its rules (%s): %s.", version, why, without)
	case why != "":
		return fix(m.sudo("modprobe -a nft_compat nft_nat"), Warning, "%s, but the kernel does not take its rules (%s): %s.", version, why, without)
	}
	return say(OK, "%s, for networks of mode bridge.", version)
}

func (m *machine) conntrack(ctx context.Context) (finding, bool) {
	why, tried := m.ownRights(ctx).failed(tryConntrack)
	switch {
	case !tried:
		return silence()
	case why != "":
		return fix(m.sudo("modprobe nf_conntrack_netlink"), Warning,
			"connections cannot be looked up (%s): on bridge networks, UDP clients may stay with the old container of a port.", why)
	}
	return say(OK, "the kernel tracks connections, for networks of mode bridge.")
}

func (m *machine) forwarding(context.Context) (finding, bool) {
	switch m.sysctl("net/ipv4/ip_forward") {
	case "":
		return silence()
	case "0":
		return say(Info, "off. The first network of mode bridge turns it on, with the policy DROP; others leave it alone.")
	}
	return say(OK, "on, as networks of mode bridge need it.")
}

func (m *machine) bridgeFilter(context.Context) (finding, bool) {
	if m.sysctl("net/bridge/bridge-nf-call-iptables") != "1" {
		return silence()
	}
	return say(Info, "on (br_netfilter): iptables sees packets between containers of one bridge. usernet turns it off inside its own networks.")
}

func (m *machine) ipv6(context.Context) (finding, bool) {
	if !m.exists("/proc/sys/net/ipv6/conf/all") {
		return say(Warning, "this kernel runs without it: networks with --ipv6 have IPv4 only. (Was it booted with ipv6.disable=1?)")
	}
	if m.sysctl("net/ipv6/conf/all/disable_ipv6") == "1" {
		return fix(m.sudo("sysctl -w net.ipv6.conf.all.disable_ipv6=0"), Warning,
			"switched off on this host: containers cannot reach IPv6 addresses.")
	}
	routes, err := m.read("/proc/net/ipv6_route")
	if err == nil && !hasDefaultRoute(routes) {
		return say(Info, "on, but this host has no IPv6 route to the world, so its containers have none either.")
	}
	return say(OK, "on.")
}

// hasDefaultRoute reads /proc/net/ipv6_route: destination, its length, source, its length, next hop, metric, two
// counters, flags (all in hexadecimal), device.
func hasDefaultRoute(table string) bool {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		// Each namespace has a route on lo that rejects what has no other.
		if len(f) == 10 && f[0] == strings.Repeat("0", 32) && f[1] == "00" && f[9] != "lo" {
			return true
		}
	}
	return false
}
