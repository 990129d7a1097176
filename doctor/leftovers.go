package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// leftOvers names what a daemon that is gone has left. While one runs, it sees to that itself; and a daemon that starts
// takes over or removes all of it.
func (m *machine) leftOvers(ctx context.Context) (finding, bool) {
	socket := m.cfg.Daemon.ControlSocket
	if m.asleep(ctx, "usernet", socket) {
		return silence()
	}
	switch _, err := m.cfg.Ask(ctx, socket); {
	case err == nil:
		return say(OK, "none: the daemon runs and clears up after itself.")
	case !absent(err):
		return silence()
	}
	kinds := []leftOver{m.pins(), links()}
	if m.uid == 0 {
		kinds = append(kinds, portsTable(), m.chains(ctx))
	}
	var what, commands []string
	for _, k := range kinds {
		if len(k.names) > 0 {
			what = append(what, fmt.Sprintf("%s (%s)", count(len(k.names), k.kind), shorten(k.names)))
			commands = append(commands, m.perUser(m.sudo(k.remove), "podman unshare "+k.remove))
		}
	}
	if len(what) == 0 {
		return say(OK, "none.")
	}
	return fix(strings.Join(commands, "; "), Warning,
		"no daemon runs, but one has left %s. A daemon takes them over when it starts; to remove them instead:", strings.Join(what, ", "))
}

// leftOver is one kind of things left, and the command that removes them all.
type leftOver struct {
	kind   string
	names  []string
	remove string
}

// shorten names at most three.
func shorten(names []string) string {
	if len(names) > 3 {
		names = append(names[:3:3], "…")
	}
	return strings.Join(names, ", ")
}

// pins are the namespaces of usermode networks.
func (m *machine) pins() leftOver {
	dir := path.Join(m.cfg.Daemon.RunDir, "netns")
	entries, err := fs.ReadDir(m.root, rel(dir))
	l := leftOver{kind: "network namespace", remove: fmt.Sprintf("sh -c 'umount %s/*; rm -r %[1]s'", dir)}
	if err != nil {
		return l // no directory, or not for our eyes
	}
	for _, e := range entries {
		if !e.IsDir() {
			l.names = append(l.names, e.Name())
		}
	}
	return l
}

// ourLink is what usernet calls its links on the host: bridges, and the two ends of a container's veth.
var ourLink = regexp.MustCompile(`^(unb|un|uc)[0-9a-f]{12}$`)

func links() leftOver {
	all, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return leftOver{}
	}
	var names []string
	for _, l := range all {
		if ourLink.MatchString(l.Attrs().Name) {
			names = append(names, l.Attrs().Name)
		}
	}
	return leftOver{"link", names, fmt.Sprintf("sh -c 'for l in %s; do ip link delete $l; done'", strings.Join(names, " "))}
}

// hostTable is the nftables table of the host in which ports are redirected that the engine holds for us.
const hostTable = "usernet-ports"

func portsTable() leftOver {
	l := leftOver{kind: "nftables table", remove: "nft delete table inet " + hostTable}
	c, err := nftables.New()
	if err != nil {
		return l
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return l
	}
	for _, t := range tables {
		if t.Name == hostTable {
			l.names = append(l.names, t.Name)
		}
	}
	return l
}

// ourChain is how the names of our chains in iptables begin.
const ourChain = "USERNET-"

// chains looks for our iptables chains without making tables: asking iptables-legacy for one would.
func (m *machine) chains(ctx context.Context) leftOver {
	l := leftOver{kind: "iptables chain"}
	var cleanups []string
	for _, family := range []struct{ list, program string }{
		{"/proc/net/ip_tables_names", "iptables"}, {"/proc/net/ip6_tables_names", "ip6tables"},
	} {
		names := nftChains(family.program)
		if tables, err := m.read(family.list); err == nil && strings.TrimSpace(tables) != "" {
			names = append(names, m.legacyChains(ctx, family.program)...)
		}
		if len(names) > 0 {
			l.names = append(l.names, names...)
			cleanups = append(cleanups, fmt.Sprintf("%s-save | grep -v %s | %[1]s-restore", family.program, ourChain))
		}
	}
	l.remove = fmt.Sprintf("sh -c '%s'", strings.Join(cleanups, "; "))
	return l
}

// nftChains are those of iptables-nft.
func nftChains(program string) (names []string) {
	c, err := nftables.New()
	if err != nil {
		return nil
	}
	family := nftables.TableFamilyIPv4
	if program == "ip6tables" {
		family = nftables.TableFamilyIPv6
	}
	chains, err := c.ListChainsOfTableFamily(family)
	if err != nil {
		return nil
	}
	for _, chain := range chains {
		if strings.HasPrefix(chain.Name, ourChain) {
			names = append(names, chain.Name)
		}
	}
	return names
}

func (m *machine) legacyChains(ctx context.Context, program string) (names []string) {
	legacy, ok1 := m.find(program + "-legacy-save")
	plain, ok2 := m.find(program + "-save")
	if !ok1 && !ok2 {
		return nil
	}
	text, err := m.run(ctx, cmp.Or(legacy, plain))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, ":"+ourChain); ok {
			name, _, _ = strings.Cut(name, " ")
			names = append(names, ourChain+name)
		}
	}
	return names
}
