package dhcp

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// listen is the server's socket, on one interface.
func listen(t *testing.T, iface string) net.PacketConn {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if ctl := c.Control(func(fd uintptr) {
			if err = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, iface); err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
			}
		}); ctl != nil {
			return ctl
		}
		return err
	}}
	c, err := lc.ListenPacket(t.Context(), "udp4", ":67")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestUdhcpc has busybox's client get and release an address over a veth.
func TestUdhcpc(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ns := nettest.NewNS(t)
	nettest.Veth(t, "gw0", netip.PrefixFrom(gateway, 24), ns, "eth0", netip.Prefix{})
	cfg := gvproxys()
	cfg.Search = []string{"example.com"}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	c := listen(t, "gw0")
	go func() { ended <- s.Serve(ctx, c) }()

	dir := t.TempDir()
	script, said := filepath.Join(dir, "script"), filepath.Join(dir, "said")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n[ \"$1\" = bound ] || exit 0\necho \"$ip/$mask $router $dns $mtu $search $lease $serverid\" >"+said+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	udhcpc := func(args ...string) {
		t.Helper()
		args = append([]string{"udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "5", "-T", "2", "-s", script, "-O", "search", "-O", "mtu", "-x", "hostname:web"}, args...)
		err := ns.Do(func() error {
			out, err := exec.Command(busybox, args...).CombinedOutput()
			if err != nil {
				t.Logf("%s", out)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time it is the same machine
		udhcpc("-R")
		b, err := os.ReadFile(said)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(b)); got != "192.168.127.3/24 192.168.127.1 192.168.127.1 1500 example.com 3600 192.168.127.1" {
			t.Errorf("the machine is told %s", got)
		}
	}
	udhcpc("-r", "192.168.127.99")
	leases := s.Leases()
	if len(leases) != 2 || leases[1].Addr != ip(3) || leases[1].Name != "web" {
		t.Errorf("leases %+v", leases)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Serve: %v", err)
	}
}
