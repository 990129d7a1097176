package cli

import (
	"errors"
	"flag"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/vsock"
)

var values = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b vsock.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b *regexp.Regexp) bool {
		return (a == nil) == (b == nil) && (a == nil || a.String() == b.String())
	}),
}

var (
	deviceHW  = gvproxy.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	gatewayHW = gvproxy.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd}
)

func addr(text string) netip.Addr { return netip.MustParseAddr(text) }

func at(t testing.TB, url string) vsock.Addr {
	t.Helper()
	a, err := vsock.Parse(url)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func forward(t testing.TB, proto gvproxy.Proto, local, remote string) gvproxy.Forward {
	t.Helper()
	f, err := gvproxy.ParseForward(proto, local, remote)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func zones(gateway, host string) []gvproxy.Zone {
	records := []gvproxy.Record{{Name: "gateway", Addr: addr(gateway)}, {Name: "host", Addr: addr(host)}}
	return []gvproxy.Zone{{Name: "containers.internal.", Records: records}, {Name: "docker.internal.", Records: records}}
}

// bare is what gvproxy without arguments does, with change applied.
func bare(t testing.TB, change func(g *Gvproxy)) Gvproxy {
	t.Helper()
	g := filed(func(g *Gvproxy) {
		g.Network.Leases = map[netip.Addr]gvproxy.MAC{addr("192.168.127.2"): deviceHW}
		g.Network.VPNKitMACs = map[string]gvproxy.MAC{"c3d68012-0208-11ea-9fd7-f2189899ab08": deviceHW}
		g.Network.Zones = zones("192.168.127.1", "192.168.127.254")
		g.Network.SearchHost = true
		g.Network.Forwards = []gvproxy.Forward{forward(t, gvproxy.TCP, "127.0.0.1:2222", "192.168.127.2:22")}
	})
	if change != nil {
		change(&g)
	}
	return g
}

// filed is what gvproxy with an empty file does, with change applied.
func filed(change func(g *Gvproxy)) Gvproxy {
	g := Gvproxy{
		LogLevel: slog.LevelInfo,
		Network: Network{
			MTU:        1500,
			Subnet:     netip.MustParsePrefix("192.168.127.0/24"),
			Gateway:    addr("192.168.127.1"),
			Device:     addr("192.168.127.2"),
			Host:       addr("192.168.127.254"),
			GatewayMAC: gatewayHW,
			VirtualIPs: []netip.Addr{addr("192.168.127.254")},
			NAT:        map[netip.Addr]netip.Addr{addr("192.168.127.254"): addr("127.0.0.1")},
			Leases:     map[netip.Addr]gvproxy.MAC{},
			VPNKitMACs: map[string]gvproxy.MAC{},
		},
	}
	if change != nil {
		change(&g)
	}
	return g
}

func none(string) ([]byte, error) { return nil, errors.New("no file was named") }

func TestDefault(t *testing.T) {
	if diff := cmp.Diff(bare(t, nil), Default(), values); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestFlags(t *testing.T) {
	const sock = "ssh-tunnel://core@192.168.127.2/run/podman/podman.sock?key=%2Fhome%2Fme%2Fkey"
	for _, tt := range []struct {
		name string
		args string
		want func(g *Gvproxy)
	}{
		// As podman machine writes it, whose groups of flags come in any order.
		{"podman on qemu", "-mtu 1500 -ssh-port 33445 -listen-qemu unix:///run/vm.sock " +
			"-forward-user core -forward-user root -forward-sock /run/api.sock -forward-sock /run/root.sock " +
			"-forward-identity /home/me/key -forward-identity /home/me/key " +
			"-forward-dest /run/podman/podman.sock -forward-dest /run/docker.sock " +
			"-pid-file /run/gvproxy.pid -log-file /run/gvproxy.log -debug",
			func(g *Gvproxy) {
				g.LogLevel, g.Network.Debug = slog.LevelDebug, true
				g.PIDFile, g.LogFile = "/run/gvproxy.pid", "/run/gvproxy.log"
				g.Hypervisors = Hypervisors{QEMU: at(t, "unix:///run/vm.sock"), MustNotExist: []string{"/run/vm.sock"}}
				g.Network.Forwards = []gvproxy.Forward{forward(t, gvproxy.TCP, "127.0.0.1:33445", "192.168.127.2:22")}
				g.Sockets = []gvproxy.Forward{
					forward(t, gvproxy.Unix, "/run/api.sock", sock),
					forward(t, gvproxy.Unix, "/run/root.sock",
						"ssh-tunnel://root@192.168.127.2/run/docker.sock?key=%2Fhome%2Fme%2Fkey"),
				}
			}},
		{"podman on vfkit", "--mtu=1500 --ssh-port=-1 --listen-vfkit=unixgram:///run/vm.sock", func(g *Gvproxy) {
			g.Hypervisors = Hypervisors{VFKit: "/run/vm.sock", MustNotExist: []string{"/run/vm.sock"}}
			g.Network.Forwards = nil
		}},
		{"podman on WSL", "-listen-stdio=accept -debug=true", func(g *Gvproxy) {
			g.LogLevel, g.Network.Debug = slog.LevelDebug, true
			g.Hypervisors.Stdio = true
		}},
		{"podman on Hyper-V", "-listen vsock://00000400-FACB-11E6-BD58-64006A7986D3", func(g *Gvproxy) {
			g.Listen = []vsock.Addr{at(t, "hvsock://wildcard/1024")}
		}},
		{"windows pipe", `-forward-sock npipe:////./pipe/x -forward-dest /p -forward-user u -forward-identity C:\key`, func(g *Gvproxy) {
			g.Sockets = []gvproxy.Forward{
				forward(t, gvproxy.NPipe, "npipe:////./pipe/x", "ssh-tunnel://u@192.168.127.2/p?key=C%3A%5Ckey")}
		}},
		{"socket URL", "-forward-sock unix:///run/api.sock -forward-dest /run/podman/podman.sock -forward-user core -forward-identity /home/me/key",
			func(g *Gvproxy) { g.Sockets = []gvproxy.Forward{forward(t, gvproxy.Unix, "/run/api.sock", sock)} }},
		{"listen", "-listen unix:///a.sock --listen tcp://127.0.0.1:7777 -listen vsock://:1024 -services unix:///b.sock -services unix:///c.sock",
			func(g *Gvproxy) {
				g.Listen = []vsock.Addr{at(t, "unix:///a.sock"), at(t, "tcp://127.0.0.1:7777"), at(t, "vsock://:1024")}
				g.Services = at(t, "unix:///c.sock")
			}},
		{"qemu by tcp", "-listen-qemu tcp://127.0.0.1:1234", func(g *Gvproxy) { g.Hypervisors.QEMU = at(t, "tcp://127.0.0.1:1234") }},
		{"bess", "-listen-bess unixpacket:///b.sock -listen-stdio x", func(g *Gvproxy) {
			g.Hypervisors = Hypervisors{BESS: "/b.sock", Stdio: true, MustNotExist: []string{"/b.sock"}}
		}},
		{"vpnkit", "-listen-vpnkit unix:///v.sock", func(g *Gvproxy) { g.Hypervisors.VPNKit = at(t, "unix:///v.sock") }},
		{"subnet", "-subnet 10.1.2.3/29 -ssh-port 1024", func(g *Gvproxy) {
			subnet(g, "10.1.2.0/29", "10.1.2.1", "10.1.2.2", "10.1.2.6")
			g.Network.Zones = zones("10.1.2.1", "10.1.2.6")
			g.Network.Leases = map[netip.Addr]gvproxy.MAC{addr("10.1.2.2"): deviceHW}
			g.Network.Forwards = []gvproxy.Forward{forward(t, gvproxy.TCP, "127.0.0.1:1024", "10.1.2.2:22")}
		}},
		{"addresses", "-subnet 172.20.0.0/12 -gatewayIP 172.16.0.9 -deviceIP 172.31.255.254 -hostIP 172.16.0.1 -ssh-port 65535", func(g *Gvproxy) {
			subnet(g, "172.16.0.0/12", "172.16.0.9", "172.31.255.254", "172.16.0.1")
			g.Network.Zones = zones("172.16.0.9", "172.16.0.1")
			g.Network.Leases = map[netip.Addr]gvproxy.MAC{addr("172.31.255.254"): deviceHW}
			g.Network.Forwards = []gvproxy.Forward{forward(t, gvproxy.TCP, "127.0.0.1:65535", "172.31.255.254:22")}
		}},
		{"the rest", "-pcap c.pcap -notification unix:///n.sock -ec2-metadata-access -mtu 65520", func(g *Gvproxy) {
			g.Notify = "/n.sock"
			g.Network.Capture, g.Network.EC2Metadata, g.Network.MTU = "c.pcap", true, 65520
		}},
		{"behind an argument", "-mtu 1400 argument -mtu x", func(g *Gvproxy) { g.Network.MTU = 1400 }},
		{"-mtu 0", "-mtu 0", nil},
		{"numbers as Go has them", "-mtu 0x500", func(g *Gvproxy) { g.Network.MTU = 0x500 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseGvproxy(strings.Fields(tt.args), none)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(bare(t, tt.want), got, values); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// subnet moves a network and what follows from its addresses with a file and without.
func subnet(g *Gvproxy, prefix, gateway, device, host string) {
	n := &g.Network
	n.Subnet, n.Gateway, n.Device, n.Host = netip.MustParsePrefix(prefix), addr(gateway), addr(device), addr(host)
	n.VirtualIPs = []netip.Addr{n.Host}
	n.NAT = map[netip.Addr]netip.Addr{n.Host: addr("127.0.0.1")}
}

func TestFlagsRefused(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"-mtu 67", "invalid mtu 67: want 68 to 65535"},
		{"-mtu -1", "invalid mtu -1: want 68 to 65535"},
		{"-mtu 65536", "invalid mtu 65536: want 68 to 65535"},
		{"-ssh-port 1023", "invalid -ssh-port 1023: want 1024 to 65535, or -1 for none"},
		{"-ssh-port 65536", "invalid -ssh-port 65536: want 1024 to 65535, or -1 for none"},
		{"-ssh-port 0", "invalid -ssh-port 0: want 1024 to 65535, or -1 for none"},
		{"-subnet 10.0.0.0/30", "invalid subnet 10.0.0.0/30: want /29 or larger"},
		{"-subnet 10.0.0.0", `invalid subnet "10.0.0.0": want an IPv4 one, as 192.168.127.0/24`},
		{"-subnet fd00::/64", `invalid subnet "fd00::/64": want an IPv4 one, as 192.168.127.0/24`},
		{"-gatewayIP 10.0.0.1", "invalid gatewayIP 10.0.0.1: want an address of 192.168.127.0/24, 192.168.127.1 to 192.168.127.254"},
		{"-deviceIP 192.168.127.0", "invalid deviceIP 192.168.127.0: want an address of 192.168.127.0/24, 192.168.127.1 to 192.168.127.254"},
		{"-hostIP 192.168.127.255", "invalid hostIP 192.168.127.255: want an address of 192.168.127.0/24, 192.168.127.1 to 192.168.127.254"},
		{"-hostIP x", `hostIP: invalid address "x"`},
		{"-deviceIP 192.168.127.1", "invalid gatewayIP 192.168.127.1, deviceIP 192.168.127.1 and hostIP 192.168.127.254: want three addresses"},
		{"-hostIP 192.168.127.1", "invalid gatewayIP 192.168.127.1, deviceIP 192.168.127.2 and hostIP 192.168.127.1: want three addresses"},
		{"-hostIP 192.168.127.2", "invalid gatewayIP 192.168.127.1, deviceIP 192.168.127.2 and hostIP 192.168.127.2: want three addresses"},
		{"-listen-qemu unix:///q -listen-vpnkit unix:///v", "invalid sockets for both qemu and vpnkit: want one of them"},
		{"-listen-bess unixpacket:///b -listen-vpnkit unix:///v", "invalid sockets for both bess and vpnkit: want one of them"},
		{"-listen-bess unixpacket:///b -listen-qemu unix:///q", "invalid sockets for both qemu and bess: want one of them"},
		{"-listen-bess unix:///b", `bess: invalid socket "unix:///b": want unixpacket:///PATH`},
		{"-listen-vfkit unix:///b", `vfkit: invalid socket "unix:///b": want unixgram:///PATH`},
		{"-notification /n.sock", `-notification: invalid socket "/n.sock": want unix:///PATH`},
		{"-notification tcp://1.2.3.4:5", `-notification: invalid socket "tcp://1.2.3.4:5": want unix:///PATH`},
		{"-forward-sock a -forward-dest /b -forward-user c",
			"invalid -forward-sock, -forward-dest, -forward-user and -forward-identity: want as many of each"},
		{"-forward-sock tcp://a -forward-dest /b -forward-user c -forward-identity d",
			`forward: invalid socket "tcp://a": want unix:///PATH, or npipe:////./pipe/NAME`},
	} {
		_, err := ParseGvproxy(strings.Fields(tt.args), none)
		if err == nil || err.Error() != tt.want || !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("%s: %v, want %s", tt.args, err, tt.want)
		}
	}
	for _, args := range []string{"-listen foo", "-services unix:rel", "-listen-qemu %zz", "-listen-vpnkit x://y"} {
		if _, err := ParseGvproxy(strings.Fields(args), none); !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// What package flag refuses is a text to print, and so is help.
func TestUsage(t *testing.T) {
	for _, tt := range []struct {
		args, text string
		err        error
	}{
		{"-mtu x", "invalid value \"x\" for flag -mtu: parse error\nUsage of gvproxy:\n", nil},
		{"-nope", "flag provided but not defined: -nope\nUsage of gvproxy:\n", nil},
		{"-h", "Usage of gvproxy:\n", flag.ErrHelp},
	} {
		_, err := ParseGvproxy(strings.Fields(tt.args), none)
		usage, ok := errors.AsType[*UsageError](err)
		if !ok || !strings.HasPrefix(usage.Text, tt.text) || !strings.Contains(usage.Text, "-listen-vfkit URL") {
			t.Errorf("%s: %v", tt.args, err)
		}
		if tt.err != nil && !errors.Is(err, tt.err) {
			t.Errorf("%s: %v, want %v", tt.args, err, tt.err)
		}
	}
}

func TestVersion(t *testing.T) {
	got, err := ParseGvproxy([]string{"-mtu", "1", "-version", "-config", "x"}, none)
	if diff := cmp.Diff(Gvproxy{Version: true}, got, values); diff != "" || err != nil {
		t.Errorf("%v, -want +got\n%s", err, diff)
	}
}

// The file that cannot be read is named by the error that os.ReadFile gives.
func TestNoFile(t *testing.T) {
	_, err := ParseGvproxy([]string{"-config", "/nonexistent"}, os.ReadFile)
	if !errors.Is(err, fs.ErrNotExist) || err.Error() != "configuration: open /nonexistent: no such file or directory" {
		t.Error(err)
	}
}
