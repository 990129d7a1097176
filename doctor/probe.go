package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/usermode"
)

// result is how one experiment went.
type result struct {
	Err   string        `json:",omitempty"` // "": well
	Errno syscall.Errno `json:",omitempty"` // what was behind it, if the kernel said so
}

func resultOf(err error) result {
	var r result
	if err != nil {
		r.Err = err.Error()
		errors.As(err, &r.Errno)
	}
	return r
}

// results are experiments by their names. What could not be tried is not in it.
type results map[string]result

// The experiments.
const (
	tryLinks     = "links" // whether root in the namespace may change it
	tryTUN       = "tun"
	tryOffload   = "offload"
	tryNftables  = "nftables"
	trySocket    = "socket" // the rule by which containers see the addresses of clients
	tryTProxy    = "tproxy"
	tryIptables  = "iptables"
	tryIP6tables = "ip6tables"
	tryConntrack = "conntrack"
	tryUsermode  = "usermode" // a whole network
	tryFast      = "fast"     // whether it has the fast path
	trySource    = "source"   // whether it shows clients' addresses
)

// scratch is where the experiments write; it is a file system of the process's own.
const scratch = "/run"

// ProbeCommand is the argument by which a program's command line asks for Probe.
const ProbeCommand = "try-here"

// Probe makes the experiments in the network and mount namespaces that the calling process was started in, which must
// be its own, and writes their results to w. It is the other half of Examine, which gives it the arguments that
// follow ProbeCommand.
func Probe(ctx context.Context, args []string, w io.Writer) error {
	if err := inside(args); err != nil {
		return err
	}
	rs := results{}
	rs[tryLinks] = resultOf(loopbackUp())
	if rs[tryLinks].Err == "" {
		rs.tun()
		rs.netfilter(ctx)
		rs.network()
	}
	return json.NewEncoder(w).Encode(rs)
}

// namespaces names the calling process's network and mount namespaces.
func namespaces() ([]string, error) {
	var names []string
	for _, kind := range []string{"net", "mnt"} {
		name, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// inside fails unless this process is in namespaces other than those given. Somebody may have called it by hand.
func inside(outer []string) error {
	own, err := namespaces()
	if err != nil {
		return err
	}
	if len(outer) != len(own) {
		return errors.New("this is for usernet doctor itself")
	}
	for i, name := range own {
		if name == outer[i] {
			return fmt.Errorf("%s is not a namespace of this process's own", name)
		}
	}
	return nil
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

func (rs results) tun() {
	dev, err := openTUN()
	rs[tryTUN] = resultOf(err)
	if err != nil {
		return
	}
	defer dev.Close()
	rs[tryOffload] = resultOf(largePackets(dev))
}

func (rs results) netfilter(ctx context.Context) {
	err := canNftables()
	rs[tryNftables] = resultOf(err)
	if err == nil {
		rs[trySocket] = resultOf(addRule(socketRule))
		rs[tryTProxy] = resultOf(addRule(tproxyRule))
	}
	_, err = netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	rs[tryConntrack] = resultOf(err)
}

// network opens a usermode network, and whatever it needs of a bridge network that is not in the kernel.
func (rs results) network() {
	if err := ownScratch(); err != nil {
		rs[tryUsermode] = resultOf(err)
		return
	}
	for name, program := range map[string]string{tryIptables: "iptables-restore", tryIP6tables: "ip6tables-restore"} {
		if path, err := exec.LookPath(program); err == nil {
			rs[name] = resultOf(restore(path))
		}
	}
	g, err := usermode.Open(usermode.Config{
		ID: "doctor", Dir: scratch, Bridge: "br0", FastPath: true,
		Subnets: []usernet.Subnet{
			{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Gateway: netip.MustParseAddr("192.0.2.1")},
			{Prefix: netip.MustParsePrefix("2001:db8::/64"), Gateway: netip.MustParseAddr("2001:db8::1")},
		},
	})
	rs[tryUsermode] = resultOf(err)
	if err != nil {
		return
	}
	defer g.Close()
	_, err = g.FastPath()
	rs[tryFast] = resultOf(err)
	_, err = g.Transparent()
	rs[trySource] = resultOf(err)
}

// ownScratch hides the machine's scratch directory from this process, which then writes to memory.
func ownScratch() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount a tmpfs at %s: %w", scratch, err)
	}
	return nil
}

// bridgeRules has every kind of match and target that package firewall uses.
const bridgeRules = `*nat
:USERNET-DOCTOR - [0:0]
-A USERNET-DOCTOR -m addrtype --dst-type LOCAL -p tcp --dport 80 -j DNAT --to-destination :8080
-A POSTROUTING -o usernet0 -j MASQUERADE
COMMIT
*mangle
:USERNET-DOCTOR - [0:0]
-A USERNET-DOCTOR -m conntrack ! --ctstate ESTABLISHED -j DROP
COMMIT
`

// restore loads the rules that bridge networks need.
func restore(program string) error {
	cmd := exec.Command(program, "--noflush", "--wait", "5")
	cmd.Stdin = strings.NewReader(bridgeRules)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, firstLine(strings.TrimSpace(string(out))))
	}
	return nil
}
