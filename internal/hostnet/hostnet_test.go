package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const deadline = 10 * time.Second

// start runs a Watcher until the test ends; whatever starts with un is ours.
func start(t *testing.T) (*Watcher, <-chan struct{}) {
	t.Helper()
	w := New(func(name string) bool { return strings.HasPrefix(name, "un") })
	changed := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Run(ctx, func() { changed <- struct{}{} }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	wait(t, changed)
	return w, changed
}

func wait(t *testing.T, changed <-chan struct{}) {
	t.Helper()
	select {
	case <-changed:
	case <-time.After(deadline):
		t.Fatal("changed was not called")
	}
}

// becomes waits until the bridges are those of want, one "NAME PREFIX …" each.
func becomes(t *testing.T, w *Watcher, changed <-chan struct{}, want ...string) {
	t.Helper()
	end := time.After(deadline)
	for {
		var got []string
		for _, b := range w.Bridges() {
			got = append(got, strings.TrimSpace(fmt.Sprintln(b.Name, strings.Trim(fmt.Sprint(b.Prefixes), "[]"))))
		}
		d := cmp.Diff(want, got, cmpopts.EquateEmpty())
		if d == "" {
			return
		}
		select {
		case <-changed:
		case <-end:
			t.Fatalf("bridges (-want +got):\n%s", d)
		}
	}
}

func add(t *testing.T, l netlink.Link) netlink.Link {
	t.Helper()
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatalf("add %s %s: %v", l.Type(), l.Attrs().Name, err)
	}
	t.Cleanup(func() { netlink.LinkDel(l) })
	return l
}

func named(name string) netlink.LinkAttrs {
	la := netlink.NewLinkAttrs()
	la.Name = name
	return la
}

func address(t *testing.T, l netlink.Link, a string) *netlink.Addr {
	t.Helper()
	addr, err := netlink.ParseAddr(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(l, addr); err != nil {
		t.Fatal(err)
	}
	return addr
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRunFollowsLinks(t *testing.T) {
	nettest.NoLeaks(t)
	w, changed := start(t)
	becomes(t, w, changed)

	br := add(t, &netlink.Bridge{LinkAttrs: named("docker0")})
	becomes(t, w, changed, "docker0")
	v4 := address(t, br, "10.200.9.1/24")
	becomes(t, w, changed, "docker0 10.200.9.0/24")
	address(t, br, "fd00:9::1/64")
	address(t, br, "fe80::1/64")
	becomes(t, w, changed, "docker0 10.200.9.0/24 fd00:9::/64")
	for a, want := range map[string]bool{
		"10.200.9.2": true, "::ffff:10.200.9.2": true, "fd00:9::2": true, "10.200.9.255": true,
		"10.200.9.1": false, "fd00:9::1": false, "10.200.10.2": false, "fe80::1": false, "fe80::2": false, "127.0.0.1": false,
	} {
		if got := w.Contains(netip.MustParseAddr(a)); got != want {
			t.Errorf("Contains(%s) = %t, want %t", a, got, want)
		}
	}
	if w.Contains(netip.Addr{}) {
		t.Error("Contains says true of no address")
	}

	// Ports: a container's leaves the bridge what it is, one that may lead to the LAN does not.
	veth := add(t, &netlink.Veth{LinkAttrs: named("veth0"), PeerName: "veth1"})
	nic := add(t, &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "lan0", ParentIndex: veth.Attrs().Index, TxQLen: -1}})
	must(t, netlink.LinkSetMaster(nic, br))
	becomes(t, w, changed)
	if w.Contains(netip.MustParseAddr("10.200.9.2")) {
		t.Error("Contains counts a bridge to the LAN")
	}
	must(t, netlink.LinkSetNoMaster(nic))
	becomes(t, w, changed, "docker0 10.200.9.0/24 fd00:9::/64")
	must(t, netlink.LinkDel(nic)) // it has the veth for itself
	must(t, netlink.LinkSetMaster(veth, br))
	tap := add(t, &netlink.Tuntap{LinkAttrs: named("tap0"), Mode: netlink.TUNTAP_MODE_TAP})
	must(t, netlink.LinkSetMaster(tap, br))

	must(t, netlink.AddrDel(br, v4))
	becomes(t, w, changed, "docker0 fd00:9::/64")
	add(t, &netlink.Bridge{LinkAttrs: named("un0123")})
	add(t, &netlink.Bridge{LinkAttrs: named("br-1")})
	becomes(t, w, changed, "br-1", "docker0 fd00:9::/64")
	must(t, netlink.LinkDel(br))
	becomes(t, w, changed, "br-1")
}

// An address of the host's that appears inside a foreign range is no container, though the bridges stay the same.
func TestOwnAddressesAreFollowed(t *testing.T) {
	w, changed := start(t)
	br := add(t, &netlink.Bridge{LinkAttrs: named("docker0")})
	address(t, br, "10.200.9.1/24")
	becomes(t, w, changed, "docker0 10.200.9.0/24")
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	own := address(t, lo, "10.200.9.77/32")
	t.Cleanup(func() { netlink.AddrDel(lo, own) })
	// The next change of the bridges is seen together with it, or after it.
	add(t, &netlink.Bridge{LinkAttrs: named("br-1")})
	becomes(t, w, changed, "br-1", "docker0 10.200.9.0/24")
	if w.Contains(netip.MustParseAddr("10.200.9.77")) {
		t.Error("Contains takes an address of the host for a container")
	}
}

// changed is not called when only other links change.
func TestChangedOnlyForBridges(t *testing.T) {
	w, changed := start(t)
	add(t, &netlink.Veth{LinkAttrs: named("veth0"), PeerName: "veth1"})
	add(t, &netlink.Bridge{LinkAttrs: named("un0123")})
	add(t, &netlink.Bridge{LinkAttrs: named("br-1")})
	wait(t, changed)
	becomes(t, w, changed, "br-1")
	if n := len(changed); n != 0 {
		t.Errorf("changed was called %d times too often", n)
	}
}

func TestRunStops(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	nettest.NoLeaks(t)
	for range 10 {
		ctx, cancel := context.WithCancel(context.Background())
		if err := New(func(string) bool { return false }).Run(ctx, cancel); err != nil {
			t.Errorf("Run = %v, want nil after cancel", err)
		}
	}
}

// More events than the socket holds: the kernel drops them and says ENOBUFS once.
func TestReceiveSurvivesOverflow(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	small := func() *nl.NetlinkSocket {
		s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
		must(t, err)
		must(t, s.SetReceiveBufferSize(1, false))
		return s
	}
	premise, s := small(), small()
	defer premise.Close()
	for range 20 {
		br := &netlink.Bridge{LinkAttrs: named("br-1")}
		must(t, netlink.LinkAdd(br))
		must(t, netlink.LinkDel(br))
	}
	if _, _, err := premise.Receive(); !errors.Is(err, unix.ENOBUFS) {
		t.Fatalf("the socket did not overflow: %v", err)
	}

	ctx, cancel := context.WithCancel(context.Background())
	events, done := make(chan struct{}, 1), make(chan error)
	go func() { done <- receive(ctx, s, events) }()
	wait(t, events)
	cancel()
	s.Close()
	if err := <-done; err != nil {
		t.Errorf("receive: %v", err)
	}
}
