package driver

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
)

func openRootless(t *testing.T) *Driver {
	t.Helper()
	d, err := Open(Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Rootless: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestRootlessLeavesTheHostAlone(t *testing.T) {
	d := openRootless(t)
	n := usernet.Network{ID: "aaaaaaaaaaaa", Options: usernet.Options{Mode: usernet.Bridge},
		Subnets: []usernet.Subnet{{Prefix: netip.MustParsePrefix("10.200.1.0/24"), Gateway: netip.MustParseAddr("10.200.1.1")}}}
	_, err := d.PrepareNetwork(t.Context(), n, nil)
	for _, err := range []error{err, d.CreateNetwork(t.Context(), n)} {
		if !errors.Is(err, usernet.ErrInvalid) || !strings.Contains(err.Error(), "option mode=bridge: it changes the host's network, which takes root") {
			t.Errorf("a bridge network without root: %v", err)
		}
	}
	n.Options.Mode = usernet.Usermode
	if _, err := d.PrepareNetwork(t.Context(), n, nil); err != nil {
		t.Error(err)
	}
	if !d.Idle() {
		t.Error("there are no containers")
	}
}

func TestHostAlias(t *testing.T) {
	if (&Driver{}).hostAlias() != nil {
		t.Error("root's containers have an alias of the host")
	}
	host := openRootless(t).hostAlias()
	if a := host(); a.IsValid() {
		t.Errorf("a host without an address is %s", a)
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lan0"}}
	if err := netlink.LinkAdd(br); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(br)
	for _, a := range []string{"fd00:200::7/64", "10.200.0.7/24"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(br, addr); err != nil {
			t.Fatal(err)
		}
	}
	if a := host(); a != netip.MustParseAddr("10.200.0.7") {
		t.Errorf("the host is %s, want 10.200.0.7", a)
	}
}
