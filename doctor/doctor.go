// Package doctor looks at what this machine can do for usernet and says what to type where something is lacking. It
// changes nothing: what has to be tried is tried in a process in namespaces of its own, which end with it. (Trying may
// make the kernel load modules, as using them would.)
package doctor

import (
	"context"
	"sync"
	"time"

	"github.com/usernet/usernet/config"
)

// Status is what a finding means for the user.
type Status string

const (
	OK      Status = "ok"
	Warning Status = "warning" // something works less well or only with help
	Missing Status = "missing" // something does not work
	Info    Status = "info"    // good to know
)

// Finding is the answer to one question about the machine.
type Finding struct {
	Group  string `json:"group"` // kernel, rights, engines or usernet
	Name   string `json:"name"`
	Status Status `json:"status"`
	Detail string `json:"detail"` // one sentence: what it means for the user
	Fix    string `json:"fix"`    // a command line for the shell; "" if there is nothing to do

	essential bool // without it no usermode network works
}

// Daemon is what a daemon told about itself.
type Daemon struct {
	Networks int
	Down     []string // networks that could not be brought back
}

// Config says what to look at, and how.
type Config struct {
	Version string        // of the program that asks
	Daemon  config.Daemon // where the daemon's sockets and directories are
	File    string        // the daemon's configuration file, which need not exist
	Faulty  error         // what is wrong with that file; nil: nothing

	// Probe is the beginning of a command line whose program calls the function Probe with the arguments that are added.
	Probe []string
	// Ask asks the daemon at a control socket. The error's chain has fs.ErrNotExist or syscall.ECONNREFUSED if there
	// is none, and fs.ErrPermission if this user may not ask.
	Ask func(ctx context.Context, socket string) (Daemon, error)
}

// patience is how long one check may take.
const patience = 8 * time.Second

// check answers one question, or has nothing to say about this machine. It gives up soon after ctx is done.
type check struct {
	group, name string
	look        func(*machine, context.Context) (finding, bool)
}

// finding is a Finding without its place. The zero value of essential is what nearly all are.
type finding struct {
	status    Status
	detail    string
	fix       string
	essential bool
}

// The groups, in the order of the report.
const (
	kernel  = "kernel"
	rights  = "rights"
	engines = "engines"
	ours    = "usernet"
)

var checks = []check{
	{kernel, "TUN device", (*machine).tun},
	{kernel, "large packets", (*machine).offload},
	{kernel, "nftables", (*machine).nftables},
	{kernel, "client addresses", (*machine).transparent},
	{kernel, "fast path", (*machine).fastPath},
	{kernel, "iptables", (*machine).iptables},
	{kernel, "ip6tables", (*machine).ip6tables},
	{kernel, "conntrack", (*machine).conntrack},
	{kernel, "forwarding", (*machine).forwarding},
	{kernel, "bridge filter", (*machine).bridgeFilter},
	{kernel, "IPv6", (*machine).ipv6},
	{kernel, "vsock", (*machine).vsock},

	{rights, "user namespaces", (*machine).userNamespaces},
	{rights, "subordinate IDs", (*machine).subordinateIDs},
	{rights, "ping", (*machine).ping},
	{rights, "low ports", (*machine).lowPorts},
	{rights, "open files", (*machine).openFiles},
	{rights, "pipe memory", (*machine).pipes},
	{rights, "listen queue", (*machine).listenQueue},
	{rights, "SELinux", (*machine).selinux},

	{engines, "Docker", (*machine).docker},
	{engines, "Docker driver", (*machine).dockerDriver},
	{engines, "Podman", (*machine).podman},
	{engines, "netavark", (*machine).netavark},
	{engines, "Podman driver", (*machine).podmanDriver},
	{engines, "containerd", (*machine).containerd},
	{engines, "CNI", (*machine).cni},

	{ours, "trial network", (*machine).usermode},
	{ours, "configuration", (*machine).configuration},
	{ours, "daemon", (*machine).daemon},
	{ours, "host gateway", (*machine).hostGateway},
	{ours, "version", (*machine).version},
	{ours, "systemd", (*machine).systemd},
	{ours, "left-overs", (*machine).leftOvers},
	{ours, "DNS servers", (*machine).resolvers},
}

// Examine asks all questions at once and returns the answers in the order of the groups. It returns when all have been
// answered or given up.
func Examine(ctx context.Context, cfg Config) []Finding {
	return examine(ctx, newMachine(cfg), checks)
}

func examine(ctx context.Context, m *machine, checks []check) []Finding {
	answers := make([]*finding, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, m.patience)
			defer cancel()
			if f, ok := c.look(m, ctx); ok {
				answers[i] = &f
			}
		})
	}
	wg.Wait()
	var all []Finding
	for i, c := range checks {
		if f := answers[i]; f != nil {
			all = append(all, Finding{c.group, c.name, f.status, f.detail, f.fix, f.essential})
		}
	}
	return all
}

// Works tells whether usermode networks can work for the user, as far as all shows it.
func Works(all []Finding) bool {
	for _, f := range all {
		if f.essential && f.Status == Missing {
			return false
		}
	}
	return true
}
