package endpoint_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var (
	gateway = netip.MustParseAddr("10.200.7.1")
	subnet  = usernet.Subnet{Prefix: netip.MustParsePrefix("10.200.7.0/24"), Gateway: gateway}
	subnet6 = usernet.Subnet{Prefix: netip.MustParsePrefix("fd00:7::/64"), Gateway: netip.MustParseAddr("fd00:7::1")}
)

// network is a network with one v4 and one v6 subnet.
func network(mode usernet.Mode) usernet.Network {
	return usernet.Network{
		ID:      strings.Repeat("ab12", 16),
		Subnets: []usernet.Subnet{subnet, subnet6},
		Options: usernet.Options{Mode: mode, ICC: true, MTU: 1400},
	}
}

func open(t *testing.T, cfg endpoint.Config) *endpoint.Segment {
	t.Helper()
	cfg.Log = slog.New(slog.DiscardHandler)
	s, err := endpoint.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := endpoint.Remove(cfg); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func endpointOf(n usernet.Network, last byte) usernet.Endpoint {
	return usernet.Endpoint{
		ID:        strings.Repeat(string('a'+rune(last%26)), 64),
		NetworkID: n.ID,
		Addr4:     netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200, 7, last}), 24),
		MAC:       []byte{2, 0, 0, 0, 0, last},
	}
}

// give moves the container's end of a link into a namespace, as an engine does.
func give(t *testing.T, l *endpoint.Link, ep usernet.Endpoint, gw netip.Addr) *netns.NS {
	t.Helper()
	ns := nettest.NewNS(t)
	peer, err := netlink.LinkByName(l.PeerName)
	if err != nil {
		t.Fatal(err)
	}
	if got := peer.Attrs().HardwareAddr.String(); got != ep.MAC.String() {
		t.Errorf("%s has the address %s, want %s", l.PeerName, got, ep.MAC)
	}
	if err := netlink.LinkSetNsFd(peer, ns.Fd()); err != nil {
		t.Fatal(err)
	}
	nettest.Handle(t, ns, func(h *netlink.Handle) error {
		if err := nettest.Addr(h, l.PeerName, ep.Addr4); err != nil {
			return err
		}
		peer, err := h.LinkByName(l.PeerName)
		if err != nil {
			return err
		}
		return h.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: gw.AsSlice()})
	})
	return ns
}

func ping(ns *netns.NS, addr string) error {
	return ns.Do(func() error { return exec.Command("ping", "-c1", "-W2", addr).Run() })
}

func TestContainersReachEachOtherAndTheGateway(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Bridge, usernet.Usermode} {
		t.Run(string(mode), func(t *testing.T) {
			nettest.NoLeaks(t)
			n := network(mode)
			s := open(t, endpoint.Config{Network: n, Dir: t.TempDir()})
			var spaces []*netns.NS
			for _, last := range []byte{2, 3} {
				ep := endpointOf(n, last)
				l, err := s.Connect(ep)
				if err != nil {
					t.Fatal(err)
				}
				peer, err := netlink.LinkByName(l.PeerName)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := l.Close(); err != nil {
						t.Error(err)
					}
				})
				if peer.Attrs().MTU != 1400 {
					t.Errorf("MTU %d, want 1400", peer.Attrs().MTU)
				}
				spaces = append(spaces, give(t, l, ep, gateway))
			}
			for _, to := range []string{"10.200.7.3", "10.200.7.1"} {
				if err := ping(spaces[0], to); err != nil {
					t.Errorf("ping %s: %v", to, err)
				}
			}
			if mode == usernet.Usermode {
				if _, err := netlink.LinkByName(endpoint.FabricBridge); err == nil {
					t.Error("the fabric's bridge is in the host's namespace")
				}
			}
		})
	}
}

func TestICCOffKeepsContainersApart(t *testing.T) {
	n := network(usernet.Bridge)
	n.Options.ICC = false
	s := open(t, endpoint.Config{Network: n})
	var spaces []*netns.NS
	for _, last := range []byte{2, 3} {
		ep := endpointOf(n, last)
		l, err := s.Connect(ep)
		if err != nil {
			t.Fatal(err)
		}
		spaces = append(spaces, give(t, l, ep, gateway))
	}
	if err := ping(spaces[0], "10.200.7.1"); err != nil {
		t.Errorf("ping the gateway: %v", err)
	}
	if err := ping(spaces[0], "10.200.7.3"); err == nil {
		t.Error("a container reached its neighbour with icc off")
	}
}

func TestOpenAgainFindsEverything(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Bridge, usernet.Usermode} {
		t.Run(string(mode), func(t *testing.T) {
			n := network(mode)
			cfg := endpoint.Config{Network: n, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
			first, err := endpoint.Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			ep := endpointOf(n, 2)
			l, err := first.Connect(ep)
			if err != nil {
				t.Fatal(err)
			}
			ns := give(t, l, ep, gateway)
			cfg.Added = first.Added()
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}

			s := open(t, cfg)
			if got, err := s.Link(ep).State(); got != endpoint.Moved || err != nil {
				t.Errorf("state after reopening: %v, %v, want Moved", got, err)
			}
			if err := ping(ns, "10.200.7.1"); err != nil {
				t.Errorf("ping the gateway: %v", err)
			}
			if err := s.Link(ep).Close(); err != nil {
				t.Error(err)
			}
			if got, err := s.Link(ep).State(); got != endpoint.Gone || err != nil {
				t.Errorf("state after Close: %v, %v, want Gone", got, err)
			}
			if err := s.Link(ep).Close(); err != nil {
				t.Errorf("Close of what is gone: %v", err)
			}
		})
	}
}

func TestAdoptedBridgeIsGivenBackAsItWas(t *testing.T) {
	nettest.NoLeaks(t)
	la := netlink.NewLinkAttrs()
	la.Name = "lan0"
	lan := &netlink.Bridge{LinkAttrs: la}
	if err := netlink.LinkAdd(lan); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(lan) })
	own, _ := netlink.ParseAddr("10.200.8.1/24")
	if err := netlink.AddrAdd(lan, own); err != nil {
		t.Fatal(err)
	}
	n := network(usernet.Bridge)
	n.Options.BridgeName = "lan0"
	cfg := endpoint.Config{Network: n, Log: slog.New(slog.DiscardHandler)}
	s, err := endpoint.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Added = s.Added()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := endpoint.Remove(cfg); err != nil {
			t.Fatal(err)
		}
	}
	addrs, err := netlink.AddrList(lan, netlink.FAMILY_V4)
	if err != nil {
		t.Fatalf("the adopted bridge is gone: %v", err)
	}
	if len(addrs) != 1 || addrs[0].IPNet.String() != "10.200.8.1/24" {
		t.Errorf("addresses %v, want only its own", addrs)
	}
}

// A process killed between making the bridge and marking it leaves one without a mark.
func TestUnmarkedBridgeIsOursByItsAddress(t *testing.T) {
	nettest.NoLeaks(t)
	n := network(usernet.Bridge)
	cfg := endpoint.Config{Network: n, Log: slog.New(slog.DiscardHandler)}
	unmark := func() netlink.Link {
		s, err := endpoint.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		link, err := netlink.LinkByName(n.BridgeName())
		if err != nil {
			t.Fatal(err)
		}
		if link.Attrs().Alias == "" {
			t.Error("Open did not mark the bridge")
		}
		if err := netlink.LinkSetAlias(link, ""); err != nil {
			t.Fatal(err)
		}
		return link
	}
	unmark()
	link := unmark() // it was opened unmarked, and got the mark
	if err := endpoint.Remove(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName(n.BridgeName()); err == nil {
		t.Error("Remove left the bridge")
	}

	// Somebody else's of that name has another address.
	la := netlink.NewLinkAttrs()
	la.Name = link.Attrs().Name
	strange := &netlink.Bridge{LinkAttrs: la}
	if err := netlink.LinkAdd(strange); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(strange) })
	if s, err := endpoint.Open(cfg); !errors.Is(err, usernet.ErrExists) {
		s.Close()
		t.Errorf("open beside a strange bridge: %v, want one that says it exists", err)
	}
}

func TestOpenRefusesALinkThatIsNoBridge(t *testing.T) {
	ns := nettest.NewNS(t)
	nettest.Veth(t, "taken0", netip.Prefix{}, ns, "peer0", netip.Prefix{})
	n := network(usernet.Bridge)
	n.Options.BridgeName = "taken0"
	s, err := endpoint.Open(endpoint.Config{Network: n})
	if err == nil {
		s.Close()
		t.Fatal("Open took a veth for a bridge")
	}
	if !errors.Is(err, usernet.ErrExists) || !strings.Contains(err.Error(), "taken0") {
		t.Errorf("error %q, want one that says taken0 exists", err)
	}
}

func TestRunTellsOfVanishedLinksAndStops(t *testing.T) {
	defer goleak.VerifyNone(t)
	n := network(usernet.Bridge)
	s := open(t, endpoint.Config{Network: n})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	gone := make(chan struct{}, 16)
	done := make(chan error)
	go func() {
		done <- s.Run(ctx, func() {
			select {
			case gone <- struct{}{}:
			default:
			}
		})
	}()
	ep := endpointOf(n, 2)
	// Whether the watcher listens yet is only to be seen by what it tells.
	for told := false; !told; {
		l, err := s.Connect(ep)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-gone:
			told = true
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("nobody told that a link vanished")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}
