package held

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/control"
)

var (
	any4 = netip.IPv4Unspecified()
	any6 = netip.IPv6Unspecified()
	one4 = netip.MustParseAddr("192.0.2.1")
)

func TestMark(t *testing.T) {
	port := func(ip netip.Addr, n uint16, held bool) control.Port {
		return control.Port{Proto: usernet.TCP, HostIP: ip, HostPort: n, ContainerPort: 80, Held: held}
	}
	held := bound{}
	for _, at := range []string{"0.0.0.0:1", "0.0.0.0:2", "[::]:2", "192.0.2.1:3", "[::]:5"} {
		held[binding{usernet.TCP, netip.MustParseAddrPort(at)}] = true
	}
	for _, tt := range []struct {
		name string
		in   control.Port
		ipv6 bool
		want []control.Port
	}{
		{"IPv4 only", port(netip.Addr{}, 1, false), true, []control.Port{port(any4, 1, true), port(any6, 1, false)}},
		{"IPv4 only, on a host without IPv6", port(netip.Addr{}, 1, false), false, []control.Port{port(any4, 1, true)}},
		{"both", port(netip.Addr{}, 2, false), true, []control.Port{port(netip.Addr{}, 2, true)}},
		{"IPv6 only", port(netip.Addr{}, 5, false), true, []control.Port{port(any4, 5, false), port(any6, 5, true)}},
		{"nobody", port(netip.Addr{}, 4, false), true, []control.Port{port(netip.Addr{}, 4, false)}},
		{"one address", port(one4, 3, false), true, []control.Port{port(one4, 3, true)}},
		{"one of all addresses", port(one4, 1, false), true, []control.Port{port(one4, 1, true)}},
		{"one address held, all wanted", port(netip.Addr{}, 3, false), true, []control.Port{port(netip.Addr{}, 3, false)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := held.mark([]control.Port{tt.in}, tt.ipv6)
			if d := cmp.Diff(tt.want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

func TestBindingsOfAProcess(t *testing.T) {
	l4, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l4.Close()
	both, err := net.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer both.Close()
	// As Podman 6 reserves a port: bound, and not listening.
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet6{Port: 8080}); err != nil {
		t.Fatal(err)
	}
	held := bound{}
	if err := held.add(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	port := func(a net.Addr) uint16 { return a.(interface{ AddrPort() netip.AddrPort }).AddrPort().Port() }
	for _, want := range []binding{
		{usernet.TCP, l4.Addr().(*net.TCPAddr).AddrPort()},
		{usernet.UDP, netip.AddrPortFrom(any4, port(both.LocalAddr()))},
		{usernet.UDP, netip.AddrPortFrom(any6, port(both.LocalAddr()))},
		{usernet.TCP, netip.AddrPortFrom(any4, 8080)},
		{usernet.TCP, netip.AddrPortFrom(any6, 8080)},
	} {
		if !held[want] {
			t.Errorf("%s %s is missing in %v", want.proto, want.at, held)
		}
	}
	if err := held.add(1 << 22); err != nil {
		t.Errorf("a process that is not there: %v", err)
	}
}

func TestParentAndMonitors(t *testing.T) {
	if got, err := Parent(os.Getpid()); err != nil || got != os.Getppid() {
		t.Errorf("parent %d, %v, want %d", got, err, os.Getppid())
	}
	if got := monitors("2db8b57420ec37be7c3f57c8554c233e"); len(got) != 0 {
		t.Errorf("monitors %v", got)
	}
}

// Podman binds the ports after it has asked for the network. What another process has it will not get.
func TestExpected(t *testing.T) {
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	there := netip.MustParseAddrPort(taken.Addr().String())
	port := control.Port{Proto: usernet.TCP, HostIP: there.Addr(), HostPort: there.Port(), ContainerPort: 80}
	wildcard := port
	wildcard.HostIP = netip.Addr{}
	const nobody = 1 << 22 // a process that is not there
	for _, p := range []control.Port{port, wildcard} {
		if got, err := Expected("c1", nobody, []control.Port{p}); !errors.Is(err, usernet.ErrPortTaken) {
			t.Errorf("%v: got %v, %v", p, got, err)
		}
		if got, err := Expected("c1", os.Getpid(), []control.Port{port}); err != nil || !got[0].Held {
			t.Errorf("%v: got %v, %v; want it held", p, got, err)
		}
	}
	taken.Close()
	got, err := Expected("c1", nobody, []control.Port{port})
	if err != nil || len(got) != 1 || !got[0].Held {
		t.Errorf("got %v, %v; want one that is held", got, err)
	}
	got, err = Expected("c1", nobody, []control.Port{wildcard})
	if err != nil || len(got) != 2 || !got[0].Held || got[0].HostIP != any4 || got[1].Held || got[1].HostIP != any6 {
		t.Errorf("got %v, %v; want IPv4's half held", got, err)
	}
}
