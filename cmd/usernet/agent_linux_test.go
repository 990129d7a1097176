package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/l2"
)

func TestAgentCommandLines(t *testing.T) {
	nettest.NoLeaks(t)
	for _, tt := range []struct {
		name, args string
		code       int
		want       string // in standard error, or output if the code is 0
	}{
		{"usernet", "agent now", 2, `unexpected argument "now"`},
		{"usernet", "agent -colour", 2, "flag provided but not defined: -colour"},
		{"usernet", "agent -url carrier-pigeon://2", 1, "carrier-pigeon"},
		{"usernet", "agent -mac 1:2:3", 1, "-mac: "},
		{"usernet", "agent -mac 01:00:5e:00:00:01", 1, "a group's"},
		{"usernet", "agent -mtu 100", 1, "mtu 100"},
		{"usernet", "agent -iface lo", 1, "attach to tap lo"},
		{"usernet", "agent -iface none -preexisting", 1, "find none"},
		{"usernet", "agent -stop-if-exist none,lo", 0, "interface=lo"},
		{"gvforwarder", "-version", 0, "gvforwarder version "},
		{"gvforwarder", "-stop-if-exist lo", 0, "interface=lo"},
		{"gvforwarder", "-help", 0, "-preexisting"},
		{"gvforwarder", "-colour", 2, "flag provided but not defined: -colour"},
		{"gvforwarder", "-mac 1:2:3", 1, "-mac"},
	} {
		var out strings.Builder
		p := &program{name: tt.name, stdout: &out, stderr: &out}
		if code := p.main(t.Context(), strings.Fields(tt.args)); code != tt.code || !strings.Contains(out.String(), tt.want) {
			t.Errorf("%s %s: exit status %d, %q; want %d and %q", tt.name, tt.args, code, &out, tt.code, tt.want)
		}
	}
}

// TestGvforwarderTriesAgain has a TAP that cannot be made be no reason to end.
func TestGvforwarderTriesAgain(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	said := &lines{after: 2, then: cancel}
	p := &program{name: gvforwarderName, stdout: said, stderr: said}
	if code := p.main(ctx, []string{"-iface", "lo", "-stop-if-exist", "", "-url", "unix:///nowhere"}); code != 0 {
		t.Errorf("exit status %d, said %q", code, said.text)
	}
	if n := strings.Count(said.text, "attach to tap lo"); n != 2 {
		t.Errorf("said %q", said.text)
	}
}

// lines calls then after so many writes.
type lines struct {
	text  string
	after int
	then  func()
}

func (l *lines) Write(b []byte) (int, error) {
	l.text += string(b)
	if l.after--; l.after == 0 {
		l.then()
	}
	return len(b), nil
}

func TestAddressOf(t *testing.T) {
	a, b := addressOf("b08dfa6083e7567a1921a715000001fb", "tap0"), addressOf("b08dfa6083e7567a1921a715000001fb", "tap1")
	if a == b || a != addressOf("b08dfa6083e7567a1921a715000001fb", "tap0") || a[0]&3 != 2 {
		t.Errorf("addresses %s, %s", a, b)
	}
	if a == (l2.MAC{}) {
		t.Error("no address")
	}
}

// asProgram has the test binary be the program, with its arguments, in a mount namespace of its own.
const asProgram = "USERNET_TEST_AS_PROGRAM"

// asMain is main with an /etc of its own: resolv.conf there is gvforwarder's to write.
func asMain() {
	if err := unix.Mount("tmpfs", "/etc", "tmpfs", 0, ""); err != nil {
		fmt.Fprintln(os.Stderr, "mount /etc:", err)
		os.Exit(1)
	}
	main()
}

// TestGatewayAndAgent has both ends of a machine's network work together, each a process in a namespace of its own: DHCP, IPv6, ping, and
// TCP to the host's alias; a gateway that is killed, an agent that is asked to end.
func TestGatewayAndAgent(t *testing.T) {
	for _, name := range []string{"usernet", gvforwarderName} {
		t.Run(name, func(t *testing.T) { testGatewayAndAgent(t, name) })
	}
}

func testGatewayAndAgent(t *testing.T, name string) {
	machine := nettest.NewNS(t)
	dir := t.TempDir()
	url := "unix://" + filepath.Join(dir, "gw.sock")
	gateway := startProgram(t, "usernet", "gateway", "-listen-vm", url, "-services", "unix://"+filepath.Join(dir, "api.sock"))
	resolvers := filepath.Join(dir, "resolv.conf")
	args := []string{"agent", "-url", url, "-resolv-conf", resolvers}
	if name == gvforwarderName {
		args = []string{"-url", url, "-stop-if-exist", ""}
	}
	var agent *exec.Cmd
	if err := machine.Do(func() error {
		agent = startProgram(t, name, args...)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	ping := func(addr string) {
		t.Helper()
		if err := machine.Do(func() error {
			deadline := time.Now().Add(time.Minute)
			for {
				out, err := exec.Command("ping", "-n", "-c", "1", "-W", "1", addr).CombinedOutput()
				if err == nil {
					return nil
				}
				if time.Now().After(deadline) {
					t.Logf("%s", out)
					return err
				}
			}
		}); err != nil {
			t.Fatalf("ping %s: %v", addr, err)
		}
	}
	ping("192.168.127.1")
	ping("fd75:6e65:74:7f::1")

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := netip.AddrPortFrom(netip.MustParseAddr("192.168.127.254"), l.Addr().(*net.TCPAddr).AddrPort().Port())
	reach := func() {
		t.Helper()
		var c net.Conn
		if err := machine.Do(func() (err error) {
			c, err = net.DialTimeout("tcp", to.String(), time.Minute)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		c.Close()
		if c, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	reach()
	gateway.Process.Kill()
	gateway.Wait()
	startProgram(t, "usernet", "gateway", "-listen-vm", url, "-services", "unix://"+filepath.Join(dir, "api.sock"))
	ping("192.168.127.1")
	reach()

	agent.Process.Signal(syscall.SIGTERM)
	if err := agent.Wait(); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	nettest.Handle(t, machine, func(h *netlink.Handle) error {
		if _, err := h.LinkByName(agentTAP); err == nil {
			t.Errorf("%s is left", agentTAP)
		}
		return nil
	})
	if _, err := os.Stat(resolvers); err == nil {
		t.Errorf("%s is left", resolvers)
	}
}

// startProgram runs the program in the namespace of the calling thread until the test ends.
func startProgram(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = name
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}
