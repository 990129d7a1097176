package engine

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
)

// Snapshot is what a pretend host has at one moment, as sorted lines by section, to be compared with a later one.
type Snapshot map[string][]string

// Snapshot looks at the links, addresses, routes, rules, firewall, namespace pins, listening sockets and processes of the
// pretend host, at what usernet says and at the namespaces and TUNs that it holds open.
func (h *Host) Snapshot(ctx context.Context) (Snapshot, error) {
	// First: usernet's sockets are there before all that it holds open, and it answers when that is, too.
	state, err := h.usernetState(ctx)
	if err != nil {
		return nil, fmt.Errorf("look at usernet: %w", err)
	}
	slices.Sort(state)
	s := Snapshot{"usernet": state}
	for section, look := range map[string]func(context.Context) ([]string, error){
		"links": h.links, "routes": h.routes, "iptables": h.firewall("iptables-save"), "ip6tables": h.firewall("ip6tables-save"),
		"nft": h.nft, "namespaces": h.namespaces, "sockets": h.sockets, "processes": h.processes,
		"descriptors": h.descriptors,
	} {
		lines, err := look(ctx)
		if err != nil {
			return nil, fmt.Errorf("look at the %s: %w", section, err)
		}
		if section != "nft" {
			slices.Sort(lines)
		}
		s[section] = lines
	}
	return s, nil
}

// Diff describes how later differs from s: lines that went begin with -, lines that came with +. It is empty when
// nothing differs.
func (s Snapshot) Diff(later Snapshot) string {
	var b strings.Builder
	for _, section := range slices.Sorted(maps.Keys(s)) {
		before, after := count(s[section]), count(later[section])
		for _, sign := range []struct {
			mark string
			a, b map[string]int
		}{{"-", before, after}, {"+", after, before}} {
			for _, line := range slices.Sorted(maps.Keys(sign.a)) {
				if n := sign.a[line] - sign.b[line]; n > 0 {
					fmt.Fprintf(&b, "%s %s: %s", sign.mark, section, line)
					if n > 1 {
						fmt.Fprintf(&b, " (%d times)", n)
					}
					b.WriteByte('\n')
				}
			}
		}
	}
	return b.String()
}

func count(lines []string) map[string]int {
	m := map[string]int{}
	for _, l := range lines {
		m[l]++
	}
	return m
}

func (h *Host) links(context.Context) (lines []string, err error) {
	err = h.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			line := l.Attrs().Name + " " + l.Type()
			for _, a := range addrs {
				if !a.IP.IsLinkLocalUnicast() {
					line += " " + a.IPNet.String()
				}
			}
			lines = append(lines, line)
		}
		return nil
	})
	return lines, err
}

func (h *Host) routes(context.Context) (lines []string, err error) {
	err = h.Do(func() error {
		rules, err := netlink.RuleList(netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, r := range rules {
			lines = append(lines, "rule "+r.String())
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			lines = append(lines, fmt.Sprintf("route %s via %s table %d", r.Dst, r.Gw, r.Table))
		}
		return nil
	})
	return lines, err
}

var (
	counters  = regexp.MustCompile(`\[\d+:\d+\]`)
	untouched = regexp.MustCompile(`^:[A-Z]+ (ACCEPT|DROP)`) // a built-in chain: Docker makes tables and sets policies at first need
)

func (h *Host) firewall(save string) func(context.Context) ([]string, error) {
	return func(ctx context.Context) ([]string, error) {
		text, err := h.Run(ctx, save)
		if err != nil {
			return nil, err
		}
		var lines []string
		table := ""
		for l := range strings.Lines(text) {
			l = strings.TrimSpace(l)
			if t, ok := strings.CutPrefix(l, "*"); ok {
				table = t
			} else if l != "" && l[0] != '#' && l != "COMMIT" && !untouched.MatchString(l) {
				lines = append(lines, table+" "+counters.ReplaceAllString(l, ""))
			}
		}
		return lines, nil
	}
}

// nft lists what is not iptables': those tables are in the other sections already.
func (h *Host) nft(ctx context.Context) ([]string, error) {
	text, err := h.Run(ctx, "nft", "-s", "list", "ruleset")
	if err != nil {
		return nil, err
	}
	var lines []string
	foreign := regexp.MustCompile(`^table ip6? (filter|nat|mangle|raw|security) \{`)
	skip := false
	for l := range strings.Lines(text) {
		if strings.HasPrefix(l, "table ") {
			skip = foreign.MatchString(l)
		}
		if !skip && !strings.HasPrefix(l, "#") && strings.TrimSpace(l) != "" {
			lines = append(lines, strings.TrimRight(l, "\n"))
		}
	}
	return lines, nil
}

// namespaces lists the pinned ones, and the files in usernet's folder, pinned or not. (Docker removes its own files a
// minute after their pins.)
func (h *Host) namespaces(context.Context) ([]string, error) {
	mounts := h.proc("mountinfo")
	if h.user != nil && h.UsernetRunning() { // Podman has mounts of its own then
		mounts = fmt.Sprintf("/proc/%d/mountinfo", h.usernet.cmd.Process.Pid)
	}
	f, err := os.Open(mounts)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if fields := strings.Fields(sc.Text()); len(fields) > 4 && strings.HasPrefix(fields[3], "net:") {
			lines = append(lines, "pin "+fields[4])
		}
	}
	err = filepath.WalkDir(h.Path(h.UsernetDir()), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			lines = append(lines, "file "+strings.TrimPrefix(path, h.Path("")))
		}
		return nil // gone meanwhile
	})
	return lines, err
}

// sockets lists the listening TCP and the unconnected UDP sockets.
func (h *Host) sockets(context.Context) ([]string, error) {
	var lines []string
	for proto, listening := range map[string]string{"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07", "raw": "07", "raw6": "07"} {
		b, err := os.ReadFile(h.proc("net/" + proto))
		if err != nil {
			return nil, err
		}
		for l := range strings.Lines(string(b)) {
			f := strings.Fields(l)
			if len(f) > 3 && f[3] == listening {
				addr, err := procAddr(f[1])
				if err != nil {
					return nil, err
				}
				lines = append(lines, proto+" "+addr)
			}
		}
	}
	return lines, nil
}

// procAddr reads an address as /proc/net/tcp writes it: 32-bit words in the machine's order, a colon and the port.
func procAddr(s string) (string, error) {
	host, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	if err != nil {
		return "", err
	}
	for i := 0; i+4 <= len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return "", err
	}
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return "", fmt.Errorf("address %q: neither IPv4 nor IPv6", s)
	}
	return netip.AddrPortFrom(a, uint16(n)).String(), nil
}

// processes lists the names of the processes in the pretend host.
func (h *Host) processes(context.Context) ([]string, error) {
	entries, err := os.ReadDir(h.Path("/proc"))
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, d := range entries {
		if _, err := strconv.Atoi(d.Name()); err != nil {
			continue
		}
		if b, err := os.ReadFile(h.Path("/proc/" + d.Name() + "/comm")); err == nil {
			lines = append(lines, strings.TrimSpace(string(b)))
		}
	}
	return lines, nil
}

// usernetState is what usernet ps says, one object of every list a line, but for what changes by itself: the traffic.
func (h *Host) usernetState(ctx context.Context) ([]string, error) {
	if !h.UsernetRunning() {
		return nil, nil
	}
	text, err := h.Usernet(ctx, "ps", "--json")
	if err != nil {
		return nil, err
	}
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return nil, fmt.Errorf("usernet ps --json: %w: %s", err, text)
	}
	lines := flatten("", v, nil)
	return slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "[].traffic.") }), nil
}

// flatten writes every leaf of a JSON value with its path, without the positions in lists.
func flatten(path string, v any, lines []string) []string {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			lines = flatten(path+"."+k, e, lines)
		}
	case []any:
		for _, e := range v {
			lines = flatten(path+"[]", e, lines)
		}
	case nil:
	default:
		lines = append(lines, fmt.Sprintf("%s %v", path, v))
	}
	return lines
}

// descriptors lists the namespaces and TUNs that usernet has open.
func (h *Host) descriptors(context.Context) ([]string, error) {
	if !h.UsernetRunning() {
		return nil, nil
	}
	dir := fmt.Sprintf("/proc/%d/fd", h.usernet.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, d := range entries {
		target, err := os.Readlink(filepath.Join(dir, d.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if strings.HasPrefix(target, "net:") {
			lines = append(lines, "net")
		} else if strings.HasPrefix(target, "/dev/") && target != "/dev/null" {
			lines = append(lines, target)
		}
	}
	return lines, nil
}
