package gateway

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet/driver/gvproxy/cli"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/usermode/vmnet"
	"github.com/usernet/usernet/vsock"
)

func fromArgs(t *testing.T, args string) Config {
	t.Helper()
	g, err := cli.ParseGvproxy(strings.Fields(args), os.ReadFile)
	if err != nil {
		t.Fatal(err)
	}
	return FromGvproxy(g)
}

func TestFromGvproxy(t *testing.T) {
	c := fromArgs(t, "")
	addr := netip.MustParseAddr
	device := l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	want := vmnet.Config{
		MTU: 1500, MAC: l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd},
		Subnet: netip.MustParsePrefix("192.168.127.0/24"), Gateway: addr("192.168.127.1"),
		Subnet6: netip.MustParsePrefix("fd75:6e65:74:7f::/64"), Gateway6: addr("fd75:6e65:74:7f::1"),
		VirtualIPs: []netip.Addr{addr("192.168.127.254")},
		NAT: map[netip.Addr]netip.Addr{
			addr("192.168.127.254"): addr("127.0.0.1"), addr("fd75:6e65:74:7f::fe"): addr("::1"),
		},
		Leases: map[netip.Addr]l2.MAC{addr("192.168.127.2"): device},
	}
	if diff := cmp.Diff(want, c.Network, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("network: -want +got\n%s", diff)
	}
	if !c.SearchHost || len(c.Zones) != 2 || len(c.Forwards) != 1 || c.Reachable() {
		t.Errorf("configuration %+v", c)
	}
	if got := c.Hypervisors.VPNKitMACs["c3d68012-0208-11ea-9fd7-f2189899ab08"]; got != device {
		t.Errorf("HyperKit's machine has %s", got)
	}

	c.SetSubnet6(netip.MustParsePrefix("fd00:1::/64"))
	if to := c.Network.NAT[addr("fd00:1::fe")]; c.Network.Gateway6 != addr("fd00:1::1") || to != netip.IPv6Loopback() || len(c.Network.NAT) != 2 {
		t.Errorf("another subnet: %+v", c.Network)
	}
	c.SetSubnet6(netip.Prefix{})
	if c.Network.Subnet6.IsValid() || c.Network.Gateway6.IsValid() || len(c.Network.NAT) != 1 {
		t.Errorf("no subnet: %+v", c.Network)
	}
}

func TestHypervisorsOfGvproxy(t *testing.T) {
	for args, check := range map[string]func(Config) bool{
		"-listen-vpnkit unix:///v":                           func(c Config) bool { return len(c.Hypervisors.VPNKit) == 1 },
		"-listen-qemu unix:///q -listen-vfkit unixgram:///f": func(c Config) bool { return len(c.Hypervisors.QEMU) == 1 && c.Hypervisors.Datagrams[0] == "/f" },
		"-listen-bess unixpacket:///b":                       func(c Config) bool { return c.Hypervisors.Packets[0] == "/b" },
		"-listen-stdio accept":                               func(c Config) bool { return c.Hypervisors.In == os.Stdin && c.Hypervisors.Out == os.Stdout },
		"-listen unix:///l -listen tcp://127.0.0.1:1":        func(c Config) bool { return len(c.Listen) == 2 },
	} {
		if c := fromArgs(t, args); !check(c) || !c.Reachable() {
			t.Errorf("%s: %+v", args, c)
		}
	}
	if c := fromArgs(t, "-services unix:///s"); len(c.Services) != 1 || c.Reachable() {
		t.Errorf("services: %+v", c)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*Config){
		"half a wire":  func(c *Config) { c.Hypervisors.In = os.Stdin },
		"small subnet": func(c *Config) { c.SetSubnet6(netip.MustParsePrefix("fd00::/96")) },
		"no log":       func(c *Config) { c.Log = nil },
		"no address":   func(c *Config) { c.Network.Gateway = netip.Addr{} },
	} {
		c := fromArgs(t, "")
		c.Log = slog.New(slog.DiscardHandler)
		spoil(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

type address struct{ network, text string }

func (a address) Network() string { return a.network }
func (a address) String() string  { return a.text }

func TestGuestName(t *testing.T) {
	for _, tt := range []struct{ remote, local, want string }{
		{"192.168.127.2:4711", "192.168.127.1:80", "192.168.127.2"},
		{"[fd75::2]:4711", "", "fd75::2"},
		{"vm(3):1073741", "host(2):1024", "vm(3)"},
		{"@", "/run/vm3/vm.vsock_1024", "/run/vm3/vm.vsock_1024"},
		{"", "/run/vm3/vm.vsock_1024", "/run/vm3/vm.vsock_1024"},
		{"00000000-0000-0000-0000-000000000000", "", "00000000-0000-0000-0000-000000000000"},
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = tt.remote
		r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, net.Addr(address{"unix", tt.local})))
		if got := guestName(r); got != tt.want {
			t.Errorf("guest from %q at %q: %q, want %q", tt.remote, tt.local, got, tt.want)
		}
	}
}

type listener struct {
	net.Listener
	address
}

func (l listener) Addr() net.Addr { return l.address }

func TestMachinesOnly(t *testing.T) {
	for text, want := range map[string]bool{
		"vsock://:1024": true, "hybrid:///run/vm.vsock:1024": true, "hyperkit:///run/vm:1024": true, "hvsock://wildcard/1024": true,
		"unix:///run/x.sock": false, "tcp://127.0.0.1:1": false, "fd:x": false,
	} {
		a, err := vsock.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := machinesOnly(a, listener{address: address{network: "unix"}}); got != want {
			t.Errorf("%s: %v", text, got)
		}
		if !machinesOnly(a, listener{address: address{network: "vsock"}}) {
			t.Errorf("%s that turns out to be AF_VSOCK is not for machines only", text)
		}
	}
}

func TestVPNKitMAC(t *testing.T) {
	given := l2.MAC{2, 0, 0, 0, 0, 9}
	g := &Gateway{cfg: Config{Hypervisors: Hypervisors{VPNKitMACs: map[string]l2.MAC{"ab": given}}}}
	if got := g.vpnkitMAC("AB"); got != given {
		t.Errorf("address %s, want the one that was given", got)
	}
	a, b := g.vpnkitMAC("cd"), g.vpnkitMAC("ef")
	if a == b || a != g.vpnkitMAC("CD") || a[0]&3 != 2 {
		t.Errorf("addresses %s and %s: want two, always the same, unicast and locally administered", a, b)
	}
}
