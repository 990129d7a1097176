package agent

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// gvproxy is the path of the real one.
func gvproxy(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("USERNET_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/usernet-test"
	}
	path := filepath.Join(cache, "peers/gvproxy")
	if _, err := os.Stat(path); err != nil {
		err = fmt.Errorf("gvproxy is not there; test/setup.sh bench builds it: %w", err)
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return path
}

// startGvproxy runs gvproxy in ns, listening for agents at socket, until the test ends or the function is called.
func startGvproxy(t *testing.T, ns *netns.NS, socket string) (kill func()) {
	t.Helper()
	os.Remove(socket) // killed, gvproxy leaves it, and does not take its place
	var said bytes.Buffer
	cmd := exec.Command(gvproxy(t), "-listen", "unix://"+socket, "-ssh-port", "-1")
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	kill = func() {
		cmd.Process.Signal(syscall.SIGKILL)
		<-ended
	}
	t.Cleanup(func() {
		kill()
		if t.Failed() {
			t.Logf("gvproxy said:\n%s", &said)
		}
	})
	return kill
}

// gvproxys is the machine that gvproxy makes of ours.
var gvproxys = machine{Addr: "192.168.127.2/24", Routes: []string{"0.0.0.0/0 via 192.168.127.1", "192.168.127.0/24"}, MTU: 1500, MAC: guestMAC.String(), AcceptRA: "2"}

// TestGvproxy has the agent get its network from a real gvproxy, which is killed in between.
func TestGvproxy(t *testing.T) {
	gvproxy(t)
	noLeaks(t)
	ns := nettest.NewNS(t)
	// gvproxy does not start on a host without a network.
	nettest.Handle(t, ns, func(k *netlink.Handle) error {
		return nettest.Addr(k, "lo", netip.MustParsePrefix("10.200.0.1/32"))
	})
	socket := filepath.Join(t.TempDir(), "gv.sock")
	h := &host{t: t, socket: socket}
	cfg := h.config()
	cfg.Wait, cfg.MaxWait = 20*time.Millisecond, 100*time.Millisecond
	cfg.ResolvConf = filepath.Join(t.TempDir(), "resolv.conf")
	kill := startGvproxy(t, ns, socket)
	r := run(t, cfg)
	r.await()
	if d := cmp.Diff(gvproxys, look(t)); d != "" {
		t.Errorf("the machine (-want +got):\n%s", d)
	}
	if b, err := os.ReadFile(cfg.ResolvConf); err != nil || !strings.HasPrefix(string(b), mark+"nameserver 192.168.127.1\n") {
		t.Errorf("resolv.conf: %q, %v", b, err)
	}
	useGvproxy(t, ns)

	kill()
	await(t, false)
	startGvproxy(t, ns, socket)
	await(t, true)
	useGvproxy(t, ns)
}

// TestCommand has gvproxy be a program of the agent's, which is started again when it dies.
func TestCommand(t *testing.T) {
	noLeaks(t)
	cfg := Config{
		Command: []string{gvproxy(t), "-listen-stdio=accept", "-ssh-port=-1"}, Interface: "tap0", MAC: guestMAC,
		Wait: 20 * time.Millisecond, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	run(t, cfg).await()
	useGvproxy(t, nil)
	first := child(t, "gvproxy")
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	useGvproxy(t, nil)
	if second := child(t, "gvproxy"); second == first {
		t.Errorf("gvproxy is still process %d", first)
	}
}

// useGvproxy pings the gateway, and has TCP go to a server on the loopback of gvproxy's host; nil: that is the machine itself.
func useGvproxy(t *testing.T, ns *netns.NS) {
	t.Helper()
	if out, err := exec.Command("ping", "-n", "-c", "1", "-w", "50", gatewayIP.String()).CombinedOutput(); err != nil {
		t.Errorf("ping: %v\n%s", err, out)
	}
	if ns == nil {
		own, err := netns.Current()
		if err != nil {
			t.Fatal(err)
		}
		defer own.Close()
		ns = own
	}
	l := listenTCP(t, ns, "127.0.0.1:0")
	port := l.Addr().(*net.TCPAddr).Port
	exchange(t, l, fmt.Sprintf("192.168.127.254:%d", port), 4<<20)
}

// child is the number of a process that this one has started.
func child(t *testing.T, name string) int {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, _ := os.ReadFile(task) // of a thread that has ended
		for _, number := range strings.Fields(string(b)) {
			comm, _ := os.ReadFile("/proc/" + number + "/comm")
			if pid, err := strconv.Atoi(number); err == nil && strings.TrimSpace(string(comm)) == name {
				return pid
			}
		}
	}
	t.Fatalf("there is no child %s", name)
	return 0
}
