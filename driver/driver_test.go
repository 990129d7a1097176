package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/vsock/publish"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(gatewaySocket); path != "" {
		os.Exit(gatewayMain(path))
	}
	os.Exit(nettest.Main(m))
}

var ctx = context.Background()

// bench is a driver on directories of its own that can be stopped and started again.
type bench struct {
	*Driver
	t     *testing.T
	state string
	run   string

	gateway *publish.Client // nil: there is none
	leave   func()          // ends its Run
}

func newBench(t *testing.T) *bench {
	t.Helper()
	nettest.NoLeaks(t)
	t.Cleanup(func() { goleak.VerifyNone(t) })
	b := &bench{t: t, state: t.TempDir(), run: t.TempDir()}
	b.open()
	t.Cleanup(func() {
		for _, n := range b.Status() {
			for _, e := range n.Endpoints {
				if err := b.DeleteEndpoint(ctx, n.ID, e.ID); err != nil {
					t.Error(err)
				}
			}
			if err := b.DeleteNetwork(ctx, n.ID); err != nil {
				t.Error(err)
			}
		}
		b.close()
	})
	return b
}

func (b *bench) open() {
	b.t.Helper()
	d, err := Open(Config{StateDir: b.state, RunDir: b.run, HostGateway: b.gateway, Log: slog.New(slog.NewTextHandler(logTo{b.t}, nil))})
	if err != nil {
		b.t.Fatal(err)
	}
	b.Driver = d
	if b.gateway != nil {
		b.runGateway()
	}
}

func (b *bench) close() {
	b.t.Helper()
	if b.leave != nil {
		b.leave()
	}
	if err := b.Close(); err != nil {
		b.t.Error(err)
	}
}

func (b *bench) restart() {
	b.t.Helper()
	b.close()
	b.open()
}

type logTo struct{ t *testing.T }

func (l logTo) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func id(c byte) string { return strings.Repeat(string(c), 64) }

// netOf is a network with 10.200.N.0/24.
func netOf(mode usernet.Mode, n byte) usernet.Network {
	p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200, n, 0}), 24)
	return usernet.Network{
		ID:      id('a' + n),
		Subnets: []usernet.Subnet{{Prefix: p, Gateway: p.Addr().Next()}},
		Options: usernet.Options{Mode: mode, ICC: true, Masquerade: true},
	}
}

func (b *bench) create(n usernet.Network) {
	b.t.Helper()
	if err := b.CreateNetwork(ctx, n); err != nil {
		b.t.Fatal(err)
	}
}

// join creates and joins an endpoint as Docker does; the container's end of its link stays in the host's namespace.
func (b *bench) join(n usernet.Network, last byte) usernet.Endpoint {
	b.t.Helper()
	net4 := n.Subnets[0].Prefix.Addr().As4()
	net4[3] = last
	ep, err := b.CreateEndpoint(ctx, usernet.Endpoint{ID: id('0' + last%10), NetworkID: n.ID, Addr4: netip.PrefixFrom(netip.AddrFrom4(net4), 24)})
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.Join(ctx, n.ID, ep.ID, "/proc/self/ns/net"); err != nil {
		b.t.Fatal(err)
	}
	return ep
}

func tcp(host, container uint16) usernet.Port {
	return usernet.Port{Proto: usernet.TCP, HostPort: host, HostPortEnd: host, ContainerPort: container}
}

// status is the state of the table in one line, for comparisons.
func (b *bench) status() string {
	var s strings.Builder
	for _, n := range b.Status() {
		fmt.Fprintf(&s, "%.2s %s up=%t\n", n.ID, n.Options.Mode, n.Up)
		for _, e := range n.Endpoints {
			fmt.Fprintf(&s, "  %.2s %s %s joined=%t", e.ID, e.Addr4, e.MAC, e.Joined)
			for _, p := range e.Ports {
				fmt.Fprintf(&s, " %s%s", p.Port, p.Err)
			}
			s.WriteByte('\n')
		}
	}
	return s.String()
}

func listening(port uint16) bool {
	c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

func TestEveryCallMayComeTwice(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			n := netOf(mode, 1)
			for range 2 {
				b.create(n)
			}
			first := b.join(n, 2)
			if again := b.join(n, 2); again.MAC.String() != first.MAC.String() {
				t.Errorf("the second CreateEndpoint chose another MAC address: %s, then %s", first.MAC, again.MAC)
			}
			for range 2 {
				if err := b.Publish(ctx, n.ID, first.ID, []usernet.Port{tcp(8080, 80)}); err != nil {
					t.Fatal(err)
				}
				if !listening(8080) {
					t.Error("nobody listens on the published port")
				}
			}
			for _, undo := range []func() error{
				func() error { return b.Unpublish(ctx, n.ID, first.ID) },
				func() error { return b.Leave(ctx, n.ID, first.ID) },
				func() error { return b.DeleteEndpoint(ctx, n.ID, first.ID) },
				func() error { return b.DeleteNetwork(ctx, n.ID) },
			} {
				for range 2 {
					if err := undo(); err != nil {
						t.Error(err)
					}
				}
			}
			if listening(8080) {
				t.Error("the port is still served after Unpublish")
			}
			if got := b.status(); got != "" {
				t.Errorf("left in the table:\n%s", got)
			}
		})
	}
}

func TestRestartKeepsNetworksEndpointsAndPorts(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			n := netOf(mode, 1)
			b.create(n)
			ep := b.join(n, 2)
			if err := b.Publish(ctx, n.ID, ep.ID, []usernet.Port{tcp(0, 80), tcp(8081, 81)}); err != nil {
				t.Fatal(err)
			}
			before := b.status()
			b.restart()
			if got := b.status(); got != before {
				t.Errorf("after the restart:\n%swant:\n%s", got, before)
			}
			if !listening(8081) {
				t.Error("nobody listens on the published port")
			}
		})
	}
}

func TestRebootForgetsEndpointsAndKeepsNetworks(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	b.join(n, 2)
	b.close()
	db, err := openDB(filepath.Join(b.run, "endpoints.db"), true)
	if err != nil {
		t.Fatal(err)
	}
	if err := put(db, metaBucket, string(bootKey), "another boot"); err != nil {
		t.Fatal(err)
	}
	db.Close()
	b.open()
	if got, want := b.status(), "bb usermode up=true\n"; got != want {
		t.Errorf("after the reboot %q, want %q", got, want)
	}
}

func TestDamagedEndpointStoreIsStartedAnew(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	b.close()
	if err := os.WriteFile(filepath.Join(b.run, "endpoints.db"), make([]byte, 32<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	b.open()
	if got, want := b.status(), "bb usermode up=true\n"; got != want {
		t.Errorf("status %q, want %q", got, want)
	}
}

func TestSecondDaemonOnOneStateDirectoryIsTold(t *testing.T) {
	b := newBench(t)
	_, err := Open(Config{StateDir: b.state, RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "another usernet is using it") {
		t.Errorf("error %v, want one that says another usernet is using it", err)
	}
}

func TestHalfMadeThingsAreRemovedAtStart(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			whole, half := netOf(mode, 1), netOf(mode, 2)
			b.create(whole)
			b.create(half)
			ep := b.join(whole, 2)
			// As if the process had died just before the records were completed.
			saved := b.networks[half.ID].saved()
			saved.Creating = true
			if err := b.store.putNetwork(saved); err != nil {
				t.Fatal(err)
			}
			c := b.networks[whole.ID].containers[ep.ID]
			savedEP := saveEndpoint(c)
			savedEP.Creating = true
			if err := b.store.putEndpoint(savedEP); err != nil {
				t.Fatal(err)
			}
			b.restart()
			if got, want := b.status(), fmt.Sprintf("bb %s up=true\n", mode); got != want {
				t.Errorf("after the restart %q, want %q", got, want)
			}
			if _, err := netlink.LinkByName(ep.PeerName()); err == nil {
				t.Error("the link of the half-made endpoint is left")
			}
			if _, err := netlink.LinkByName(half.BridgeName()); mode == usernet.Bridge && err == nil {
				t.Error("the bridge of the half-made network is left")
			}
			if _, err := os.Stat(filepath.Join(b.run, "netns", shortID(half.ID))); !os.IsNotExist(err) {
				t.Errorf("the namespace of the half-made network: %v", err)
			}
		})
	}
}

func TestNamespaceOfNoNetworkIsRemovedAtStart(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	if err := b.store.deleteNetwork(b.networks[n.ID]); err != nil {
		t.Fatal(err)
	}
	b.restart()
	if _, err := os.Stat(filepath.Join(b.run, "netns", shortID(n.ID))); !os.IsNotExist(err) {
		t.Errorf("the orphaned namespace: %v, want it gone", err)
	}
}

func TestVanishedContainerIsSweptAndItsPortReleased(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	ep := b.join(n, 2)
	if err := b.Publish(ctx, n.ID, ep.ID, []usernet.Port{tcp(8080, 80)}); err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName(ep.PeerName())
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(peer); err != nil { // as when the container's namespace goes
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for b.status() != "bb usermode up=true\n" {
		if time.Now().After(deadline) {
			t.Fatalf("still there:\n%s", b.status())
		}
		time.Sleep(5 * time.Millisecond)
	}
	if listening(8080) {
		t.Error("the port of the vanished container is still served")
	}
}

func TestForgottenEndpointGivesUpItsAddress(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	old := b.join(n, 2)
	fresh, err := b.CreateEndpoint(ctx, usernet.Endpoint{ID: id('9'), NetworkID: n.ID, Addr4: old.Addr4})
	if err != nil {
		t.Fatal(err)
	}
	if fresh.Addr4 != old.Addr4 {
		t.Errorf("address %s, want %s", fresh.Addr4, old.Addr4)
	}
	if s := b.Status(); len(s[0].Endpoints) != 1 || s[0].Endpoints[0].ID != fresh.ID {
		t.Errorf("endpoints:\n%s", b.status())
	}
}

func TestLivingEndpointKeepsItsAddress(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	old := b.join(n, 2)
	ns := nettest.NewNS(t)
	peer, err := netlink.LinkByName(old.PeerName())
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetNsFd(peer, ns.Fd()); err != nil {
		t.Fatal(err)
	}
	_, err = b.CreateEndpoint(ctx, usernet.Endpoint{ID: id('9'), NetworkID: n.ID, Addr4: old.Addr4})
	if !errors.Is(err, usernet.ErrExists) {
		t.Errorf("error %v, want that the address is taken", err)
	}
	if err := b.DeleteNetwork(ctx, n.ID); err == nil || !strings.Contains(err.Error(), "active endpoints") {
		t.Errorf("DeleteNetwork: %v, want that it has active endpoints", err)
	}
}

func TestConflicts(t *testing.T) {
	b := newBench(t)
	first := netOf(usernet.Bridge, 1)
	first.Options.BridgeName = "lan1"
	b.create(first)
	for _, tt := range []struct {
		name   string
		change func(*usernet.Network)
		want   error
		word   string
	}{
		{"bridge name in use", func(n *usernet.Network) { n.Options.BridgeName = "lan1" }, usernet.ErrExists, "bridge lan1"},
		{"overlapping subnet", func(n *usernet.Network) { n.Subnets = first.Subnets }, usernet.ErrExists, "10.200.1.0/24"},
		{"same ID, other settings", func(n *usernet.Network) { n.ID = first.ID }, usernet.ErrExists, "other settings"},
		{"gateway outside", func(n *usernet.Network) { n.Subnets[0].Gateway = netip.MustParseAddr("10.1.1.1") }, usernet.ErrInvalid, "10.1.1.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := b.status()
			n := netOf(usernet.Bridge, 2)
			tt.change(&n)
			err := b.CreateNetwork(ctx, n)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.word) {
				t.Errorf("error %v, want %v with %q", err, tt.want, tt.word)
			}
			if got := b.status(); got != before {
				t.Errorf("changed the table:\n%s", got)
			}
		})
	}
	second := netOf(usernet.Usermode, 2)
	second.Subnets = first.Subnets
	b.create(second) // a usermode network has its addresses to itself
}

func TestPublishTakesAllPortsOrNone(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	one, two := b.join(n, 2), b.join(n, 3)
	if err := b.Publish(ctx, n.ID, one.ID, []usernet.Port{tcp(8080, 80)}); err != nil {
		t.Fatal(err)
	}
	err := b.Publish(ctx, n.ID, two.ID, []usernet.Port{tcp(8081, 80), tcp(8080, 80)})
	if !errors.Is(err, usernet.ErrPortTaken) || !strings.Contains(err.Error(), shortID(one.ID)) || !strings.Contains(err.Error(), "8080") {
		t.Errorf("error %v, want one that names the port and its holder", err)
	}
	if listening(8081) {
		t.Error("a port of the failed request is served")
	}
	if err := b.Publish(ctx, n.ID, two.ID, []usernet.Port{{Proto: usernet.SCTP, HostPort: 9, HostPortEnd: 9, ContainerPort: 9}}); !errors.Is(err, usernet.ErrInvalid) {
		t.Errorf("SCTP on a usermode network: %v, want invalid", err)
	}
}

// What a failed Publish had released before came back with the next start: its record still had it.
func TestFailedPublishIsNotUndoneByARestart(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	one, two := b.join(n, 2), b.join(n, 3)
	for ep, port := range map[string]uint16{one.ID: 8080, two.ID: 8081} {
		if err := b.Publish(ctx, n.ID, ep, []usernet.Port{tcp(port, 80)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Publish(ctx, n.ID, two.ID, []usernet.Port{tcp(8080, 80)}); !errors.Is(err, usernet.ErrPortTaken) {
		t.Fatalf("error %v, want that the port is taken", err)
	}
	b.restart()
	if listening(8081) {
		t.Error("the released port is served again after a restart")
	}
}

func TestPortsByHand(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	b.create(n)
	ep := b.join(n, 2)
	got, err := b.AddPorts(ctx, n.ID, ep.ID, []usernet.Port{tcp(0, 80)})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].HostPort == 0 {
		t.Fatalf("got %v, want one port with its number", got)
	}
	// The engine's ports come and go; those added by hand stay.
	if err := b.Publish(ctx, n.ID, ep.ID, []usernet.Port{tcp(8080, 80)}); err != nil {
		t.Fatal(err)
	}
	if err := b.Unpublish(ctx, n.ID, ep.ID); err != nil {
		t.Fatal(err)
	}
	if listening(8080) || !listening(got[0].HostPort) {
		t.Errorf("8080 listening: %t, want false; %d listening: %t, want true", listening(8080), got[0].HostPort, listening(got[0].HostPort))
	}
	if err := b.RemovePorts(ctx, n.ID, ep.ID, got); err != nil {
		t.Error(err)
	}
	if err := b.RemovePorts(ctx, n.ID, ep.ID, got); !errors.Is(err, usernet.ErrNotFound) {
		t.Errorf("removing it again: %v, want not found", err)
	}
}

func TestNoAddressesFromTheEngine(t *testing.T) {
	b := newBench(t)
	n := usernet.Network{ID: id('c'), Options: usernet.Options{Mode: usernet.Usermode, ICC: true}}
	b.create(n)
	b.create(n)
	var got []string
	for i := range 3 {
		ep, err := b.CreateEndpoint(ctx, usernet.Endpoint{ID: id('1' + byte(i)), NetworkID: n.ID})
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, ep.Addr4.String())
	}
	if want := "10.87.0.2/24 10.87.0.3/24 10.87.0.4/24"; strings.Join(got, " ") != want {
		t.Errorf("addresses %v, want %s", got, want)
	}
}

func TestExhaustedSubnet(t *testing.T) {
	b := newBench(t)
	n := usernet.Network{ID: id('c'), Options: usernet.Options{Mode: usernet.Usermode, ICC: true}}
	n.Options.Subnets = []usernet.Subnet{{Prefix: netip.MustParsePrefix("10.200.1.0/30"), Gateway: netip.MustParseAddr("10.200.1.1")}}
	b.create(n)
	if _, err := b.CreateEndpoint(ctx, usernet.Endpoint{ID: id('1'), NetworkID: n.ID}); err != nil {
		t.Fatal(err)
	}
	_, err := b.CreateEndpoint(ctx, usernet.Endpoint{ID: id('2'), NetworkID: n.ID})
	if err == nil || !strings.Contains(err.Error(), "10.200.1.0/30") {
		t.Errorf("error %v, want one that names the exhausted subnet", err)
	}
}

func TestUnknownThings(t *testing.T) {
	b := newBench(t)
	if _, err := b.CreateEndpoint(ctx, usernet.Endpoint{ID: id('1'), NetworkID: id('f')}); !errors.Is(err, usernet.ErrNotFound) {
		t.Errorf("CreateEndpoint: %v", err)
	}
	if _, err := b.Join(ctx, id('f'), id('1'), ""); !errors.Is(err, usernet.ErrNotFound) {
		t.Errorf("Join: %v", err)
	}
	if err := b.Publish(ctx, id('f'), id('1'), nil); !errors.Is(err, usernet.ErrNotFound) {
		t.Errorf("Publish: %v", err)
	}
}

func TestClosedDriverSaysSo(t *testing.T) {
	b := newBench(t)
	b.close()
	if err := b.CreateNetwork(ctx, netOf(usernet.Usermode, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("CreateNetwork: %v, want ErrClosed", err)
	}
	b.open()
}

func TestRunStops(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error)
	recheck := make(chan struct{})
	go func() { done <- b.Run(ctx, recheck) }()
	recheck <- struct{}{}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}
