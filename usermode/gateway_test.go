package usermode

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

func TestOpenDeclaresTheFabric(t *testing.T) {
	g := openFabric(t, testConfig(t.TempDir()))
	if ok, err := g.Transparent(); !ok {
		t.Errorf("Transparent: %v", err)
	}
	if !g.offload {
		t.Error("segmentation offload is off")
	}
	want := []string{
		"link lo up",
		"link un0 up tun persistent mtu 1500 queue 4096",
		"route 0.0.0.0/0 dev un0", "route ::/0 dev un0",
		"table 100: local 0.0.0.0/0 dev lo", "table 100: local ::/0 dev lo",
		"rule inet fwmark 1 lookup 100", "rule inet6 fwmark 1 lookup 100",
		"nft usernet divert: 1 rules",
		"net.ipv4.ip_forward 1", "net.ipv4.conf.un0.rp_filter 0", "net.ipv4.conf.un0.forwarding 1",
		"net.ipv6.conf.un0.forwarding 1", "net.ipv6.conf.un0.accept_ra 0",
	}
	if diff := cmp.Diff(want, describe(t, g.Netns())); diff != "" {
		t.Errorf("fabric (-want +got):\n%s", diff)
	}
}

func TestOpenAgainChangesNothing(t *testing.T) {
	cfg := testConfig(t.TempDir())
	g := openFabric(t, cfg)
	addBridge(t, g)
	want := describe(t, g.Netns())
	if second, err := Open(cfg); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Open of a fabric that is held: %v, %v, want EBUSY", second, err)
	}
	for range 2 {
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
	again, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if diff := cmp.Diff(want, describe(t, again.Netns())); diff != "" {
		t.Errorf("fabric after the second Open (-first +second):\n%s", diff)
	}
}

// A daemon that is killed leaves the fabric to the containers and to its successor.
func TestOpenAfterKill(t *testing.T) {
	cfg := testConfig(t.TempDir())
	g := openFabric(t, cfg)
	addBridge(t, g)
	ns := addContainer(t, g, "c1", container4, container6)
	want := describe(t, g.Netns())
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), openAndHang+"="+cfg.Dir)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "open\n" {
		t.Errorf("the other process says %q, %v", line, err)
	}
	cmd.Process.Kill()
	cmd.Wait()

	for _, dst := range []string{"192.0.2.1:80", "[2001:db8::1]:80"} {
		f, err := connectFrom(ns, netip.MustParseAddrPort(dst))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := connected(int(f.Fd()), 100*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("connect to %s while nobody is attached: %v, want that it waits", dst, err)
		}
	}
	again, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if diff := cmp.Diff(want, describe(t, again.Netns())); diff != "" {
		t.Errorf("fabric after a kill (-before +after):\n%s", diff)
	}
}

func TestOpenReplacesAnUnfittingDevice(t *testing.T) {
	cfg := testConfig(t.TempDir())
	g := openFabric(t, cfg)
	want := describe(t, g.Netns())
	for _, tc := range []struct {
		name string
		link *netlink.Tuntap
	}{
		{"TAP", &netlink.Tuntap{Mode: netlink.TUNTAP_MODE_TAP}},
		{"multi-queue", &netlink.Tuntap{Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_MULTI_QUEUE, Queues: 1}},
		{"with packet information", &netlink.Tuntap{Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_DEFAULTS &^ netlink.TUNTAP_NO_PI}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			pin, err := netns.Open(filepath.Join(cfg.Dir, cfg.ID[:12]))
			if err != nil {
				t.Fatal(err)
			}
			defer pin.Close()
			nettest.Handle(t, pin, func(h *netlink.Handle) error {
				old, err := h.LinkByName(uplink)
				if err != nil {
					return err
				}
				if err := h.LinkDel(old); err != nil {
					return err
				}
				tc.link.Name = uplink
				err = h.LinkAdd(tc.link)
				for _, f := range tc.link.Fds {
					f.Close()
				}
				return err
			})
			if g, err = Open(cfg); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { g.Close() })
			if diff := cmp.Diff(want, describe(t, g.Netns())); diff != "" {
				t.Errorf("fabric (-want +got):\n%s", diff)
			}
		})
	}
}

func TestOpenWithoutTheTUNDriver(t *testing.T) {
	nettest.NoLeaks(t)
	if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount("/dev/net", 0)
	cfg := testConfig(t.TempDir())
	_, err := Open(cfg)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/dev/net/tun") {
		t.Errorf("Open: %v, want a word about /dev/net/tun", err)
	}
	if ids, err := Pinned(cfg.Dir); len(ids) != 0 || err != nil {
		t.Errorf("pinned after a failed Open: %q, %v", ids, err)
	}
}

func TestOpenWithoutOffload(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.NoOffload = true
	if g := openFabric(t, cfg); g.offload {
		t.Error("offload is on")
	}
}

// The probe of segmentation offload writes packets into the fabric. None may go further, or be answered.
func TestProbeIsDropped(t *testing.T) {
	g := openFabric(t, testConfig(t.TempDir()))
	nettest.Handle(t, g.Netns(), func(h *netlink.Handle) error {
		l, err := h.LinkByName(uplink)
		if err != nil {
			return err
		}
		if got := l.Attrs().Statistics.RxPackets; got != 2 {
			t.Errorf("%d packets were probed, want 2", got)
		}
		return nil
	})
	p, err := newPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	timer := time.AfterFunc(50*time.Millisecond, p.stop)
	defer timer.Stop()
	for b := make([]byte, virtioHdrLen+65535); ; {
		if err := p.wait(int(g.tun.Fd())); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		n, err := g.tun.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		const hopByHop = 0 // the kernel's own multicast listener reports
		if ip := b[virtioHdrLen:n]; ip[0]>>4 == 4 || ip[6] != hopByHop {
			t.Errorf("the fabric answers %x", ip)
		}
	}
}

func TestIPv4OnlyFabric(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Subnets, cfg.MTU = cfg.Subnets[:1], 9000
	g := openFabric(t, cfg)
	got := describe(t, g.Netns())
	if !slices.Contains(got, "link un0 up tun persistent mtu 9000 queue 4096") {
		t.Errorf("un0 has another MTU: %q", got)
	}
	for _, line := range got {
		if strings.Contains(line, "::/0") || strings.Contains(line, "inet6") {
			t.Errorf("unexpected %s", line)
		}
	}
	addrs := inside(t, g.Netns(), func() ([]netlink.Addr, error) { return netlink.AddrList(nil, unix.AF_INET6) })
	if len(addrs) != 0 {
		t.Errorf("IPv6 addresses %v, want none", addrs)
	}
}

func TestInternal(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Internal = true
	g := openFabric(t, cfg)
	if diff := cmp.Diff([]string{"link lo up", "net.ipv4.ip_forward 0"}, describe(t, g.Netns())); diff != "" {
		t.Errorf("fabric (-want +got):\n%s", diff)
	}
	client, target := netip.MustParseAddrPort("192.0.2.1:1000"), netip.AddrPortFrom(container4.Addr(), 80)
	if _, err := dialTCP(g, client, target); !errors.Is(err, errInternal) {
		t.Errorf("StartTCP: %v, want %v", err, errInternal)
	}
	if _, err := g.DialUDP(client, target); !errors.Is(err, errInternal) {
		t.Errorf("DialUDP: %v, want %v", err, errInternal)
	}
	if ok, err := g.Transparent(); ok || !errors.Is(err, errInternal) {
		t.Errorf("Transparent: %v, %v", ok, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- g.Run(ctx) }()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestPinnedAndRemove(t *testing.T) {
	nettest.NoLeaks(t)
	cfg := testConfig(filepath.Join(t.TempDir(), "fabrics"))
	cfg.Internal = true
	if ids, err := Pinned(cfg.Dir); len(ids) != 0 || err != nil {
		t.Errorf("Pinned without a directory: %q, %v", ids, err)
	}
	for _, id := range []string{"aaaabbbbccccdddd", "short"} {
		cfg.ID = id
		g, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		g.Close()
	}
	// What a crash leaves between making the file and the mount.
	if err := os.WriteFile(filepath.Join(cfg.Dir, "half"), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	ids, err := Pinned(cfg.Dir)
	if diff := cmp.Diff([]string{"aaaabbbbcccc", "half", "short"}, ids); diff != "" || err != nil {
		t.Errorf("Pinned (-want +got), %v:\n%s", err, diff)
	}
	for _, id := range append(ids, "aaaabbbbccccdddd", "never") {
		if err := Remove(cfg.Dir, id); err != nil {
			t.Errorf("Remove(%s): %v", id, err)
		}
	}
	if ids, err := Pinned(cfg.Dir); len(ids) != 0 || err != nil {
		t.Errorf("Pinned after Remove: %q, %v", ids, err)
	}
	for _, id := range []string{"", ".", "..", "../x", "a/b", "a\x00b"} {
		cfg.ID = id
		if _, err := Open(cfg); !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("Open with ID %q: %v, want invalid", id, err)
		}
		if err := Remove(cfg.Dir, id); !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("Remove(%q): %v, want invalid", id, err)
		}
	}
}

// describe writes down what Open declares, as it is in ns.
func describe(t *testing.T, ns *netns.NS) []string {
	t.Helper()
	return inside(t, ns, func() (lines []string, err error) {
		add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
		var errs []error
		errs = append(errs, describeLinks(add), describeRoutes(add), describeRules(add))
		sysctls := []string{"net.ipv4.ip_forward"}
		if _, err := netlink.LinkByName(uplink); err == nil {
			sysctls = append(sysctls, "net.ipv4.conf.un0.rp_filter", "net.ipv4.conf.un0.forwarding",
				"net.ipv6.conf.un0.forwarding", "net.ipv6.conf.un0.accept_ra")
		}
		for _, s := range sysctls {
			value, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(s, ".", "/"))
			errs = append(errs, err)
			add("%s %s", s, strings.TrimSpace(string(value)))
		}
		return lines, errors.Join(errs...)
	})
}

func describeLinks(add func(string, ...any)) error {
	links, err := netlink.LinkList()
	for _, l := range links {
		state := "down"
		if l.Attrs().Flags&net.FlagUp != 0 {
			state = "up"
		}
		tun, ok := l.(*netlink.Tuntap)
		switch {
		case !ok:
			add("link %s %s", l.Attrs().Name, state)
		case tun.Mode != netlink.TUNTAP_MODE_TUN:
			add("link %s is a TAP", tun.Name)
		case tun.NonPersist:
			add("link %s goes with the process", tun.Name)
		default:
			add("link %s %s tun persistent mtu %d queue %d", tun.Name, state, tun.MTU, tun.TxQLen)
		}
	}
	return err
}

// describeRoutes leaves out the bridge's own routes.
func describeRoutes(add func(string, ...any)) error {
	var errs []error
	for _, table := range []struct {
		number int
		name   string
	}{{unix.RT_TABLE_MAIN, "route"}, {divertTable, fmt.Sprintf("table %d: local", divertTable)}} {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			filter := &netlink.Route{Table: table.number}
			routes, err := netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
			errs = append(errs, err)
			for _, r := range routes {
				if r.Dst.String() != everywhere(family).String() {
					continue
				}
				link, err := netlink.LinkByIndex(r.LinkIndex)
				if err != nil {
					return err
				}
				add("%s %s dev %s", table.name, r.Dst, link.Attrs().Name)
			}
		}
	}
	return errors.Join(errs...)
}

func describeRules(add func(string, ...any)) error {
	for _, f := range []struct {
		name   string
		number int
	}{{"inet", unix.AF_INET}, {"inet6", unix.AF_INET6}} {
		rules, err := netlink.RuleList(f.number)
		if err != nil {
			return err
		}
		for _, r := range rules {
			if r.Mark != 0 {
				add("rule %s fwmark %d lookup %d", f.name, r.Mark, r.Table)
			}
		}
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	chains, err := c.ListChains()
	for _, chain := range chains {
		rules, err := c.GetRules(chain.Table, chain)
		if err != nil {
			return err
		}
		add("nft %s %s: %d rules", chain.Table.Name, chain.Name, len(rules))
	}
	return err
}
