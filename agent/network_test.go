package agent

import (
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/undo"
)

// TestSet has each lease's settings take the place of those of the one before, and nothing else change.
func TestSet(t *testing.T) {
	noLeaks(t)
	var back undo.List
	cfg := Config{Interface: "tap0", MAC: guestMAC, ResolvConf: filepath.Join(t.TempDir(), "resolv.conf"), Log: slog.New(slog.DiscardHandler)}
	dev, err := openTAP(cfg, &back)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	n := &network{cfg: cfg, link: dev.link}
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	everywhere := prefix("0.0.0.0/0")
	a := settings{addr: prefix("10.200.0.2/24"), routes: []route{{everywhere, addr("10.200.0.1")}}, mtu: 1500, dns: []netip.Addr{addr("10.200.0.1")}}
	b := settings{
		addr: prefix("10.200.0.3/32"), mtu: 4000, dns: []netip.Addr{addr("10.200.0.9")}, search: []string{"example.com"},
		routes: []route{{dst: prefix("10.201.0.1/32")}, {everywhere, addr("10.201.0.1")}, {prefix("10.202.0.0/16"), addr("10.203.0.1")}},
	}
	for _, tt := range []struct {
		want settings
		addr string
		mtu  int
		file string
		way  []string
	}{
		{a, "10.200.0.2/24", 1500, "nameserver 10.200.0.1\n", []string{"0.0.0.0/0 via 10.200.0.1", "10.200.0.0/24"}},
		{b, "10.200.0.3/32", 4000, "nameserver 10.200.0.9\nsearch example.com\n", []string{"0.0.0.0/0 via 10.201.0.1", "10.201.0.1/32", "10.202.0.0/16 via 10.203.0.1"}},
		{settings{}, "", 4000, "", nil},
		{a, "10.200.0.2/24", 1500, "nameserver 10.200.0.1\n", []string{"0.0.0.0/0 via 10.200.0.1", "10.200.0.0/24"}},
		{settings{}, "", 1500, "", nil},
	} {
		for range 2 {
			if err := n.set(tt.want); err != nil {
				t.Fatalf("set %s: %v", tt.want, err)
			}
			want := machine{Addr: tt.addr, Routes: tt.way, MTU: tt.mtu, MAC: guestMAC.String(), AcceptRA: "2"}
			if d := cmp.Diff(want, look(t)); d != "" {
				t.Errorf("set %s (-want +got):\n%s", tt.want, d)
			}
			text := strings.TrimPrefix(content(cfg.ResolvConf), mark)
			if text != tt.file {
				t.Errorf("set %s: resolv.conf %q, want %q", tt.want, text, tt.file)
			}
		}
	}
}

// TestSetKeepsOthersRoute has somebody else's default route be an error, not a victim, and the settings be finished when it has gone.
func TestSetKeepsOthersRoute(t *testing.T) {
	noLeaks(t)
	var back undo.List
	cfg := Config{Interface: "tap0", Log: slog.New(slog.DiscardHandler)}
	dev, err := openTAP(cfg, &back)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	everywhere := netip.MustParsePrefix("0.0.0.0/0")
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	others := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(everywhere), Scope: netlink.SCOPE_LINK}
	if err := netlink.RouteAdd(others); err != nil {
		t.Fatal(err)
	}
	n := &network{cfg: cfg, link: dev.link}
	want := settings{addr: netip.MustParsePrefix("10.200.0.2/24"), routes: []route{{everywhere, netip.MustParseAddr("10.200.0.1")}}}
	if err := n.set(want); !errors.Is(err, unix.EEXIST) {
		t.Errorf("set: %v, want %v", err, unix.EEXIST)
	}
	if err := netlink.RouteDel(others); err != nil {
		t.Fatalf("the other route: %v", err)
	}
	if err := n.set(want); err != nil {
		t.Error(err)
	}
	if got := look(t); !slices.Contains(got.Routes, "0.0.0.0/0 via 10.200.0.1") {
		t.Errorf("routes %q", got.Routes)
	}
	if err := n.set(settings{}); err != nil {
		t.Error(err)
	}
}
