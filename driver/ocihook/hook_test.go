package ocihook

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// bench is a daemon behind a control socket.
type bench struct {
	*testing.T
	d      *driver.Driver
	daemon control.Daemon
	dir    string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	d, err := driver.Open(driver.Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, d: d, dir: t.TempDir()}
	b.daemon.Socket = filepath.Join(b.dir, "s")
	unix, err := net.Listen("unix", b.daemon.Socket)
	if err != nil {
		t.Fatal(err)
	}
	l := control.Listener(unix)
	srv := &http.Server{Handler: control.Handler(d, map[string]string{"mtu": "1400", "icc": "false"}, log)}
	srv.ConnContext = l.(interface {
		ConnContext(context.Context, net.Conn) context.Context
	}).ConnContext
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		<-done
		for _, n := range d.Status() {
			for _, e := range n.Endpoints {
				if err := d.Detach(context.Background(), n.ID, e.ID, nil); err != nil {
					t.Error(err)
				}
			}
			if err := d.DeleteNetwork(context.Background(), n.ID); err != nil {
				t.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// container is a process in a network namespace of its own, and its bundle.
func (b *bench) container(id string, annotations map[string]string) state {
	b.Helper()
	cmd := exec.Command("cat") // ends with its standard input
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	leash, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		leash.Close()
		cmd.Wait()
	})
	return b.of(id, cmd.Process.Pid, annotations)
}

// of is another container of a process.
func (b *bench) of(id string, pid int, annotations map[string]string) state {
	b.Helper()
	dir := filepath.Join(b.dir, id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"hostname": "h-`+id+`"}`), 0o644); err != nil {
		b.Fatal(err)
	}
	return state{State: specs.State{ID: id, Status: specs.StateCreating, Pid: pid, Bundle: dir, Annotations: annotations}}
}

func (b *bench) hook(st state) error {
	text, err := json.Marshal(st.State)
	if err != nil {
		b.Fatal(err)
	}
	h := &Hook{Daemon: b.daemon, RunDir: filepath.Join(b.dir, "run"), Stdin: bytes.NewReader(text)}
	return h.Run(b.Context())
}

func (b *bench) works(st state) {
	b.Helper()
	if err := b.hook(st); err != nil {
		b.Error(err)
	}
}

func stopped(st state) state {
	st.Status, st.Pid = specs.StateStopped, 0
	return st
}

// status is all that the daemon has, on one line for each endpoint.
func (b *bench) status() string {
	var s strings.Builder
	for _, n := range b.d.Status() {
		for _, e := range n.Endpoints {
			fmt.Fprintf(&s, "%s %s %s %d %s %s", n.Name, n.Options.Mode, n.Subnets[0].Prefix, n.MTU(), e.Container.Name, e.Addr4)
			for _, p := range e.Ports {
				fmt.Fprintf(&s, " %s", p.Port)
			}
			s.WriteByte('\n')
		}
	}
	return s.String()
}

func (b *bench) is(want string) {
	b.Helper()
	if got := b.status(); got != want {
		b.Errorf("the daemon has\n%swant\n%s", got, want)
	}
}

func TestHookThroughAContainersLife(t *testing.T) {
	b := newBench(t)
	first := b.container("one", map[string]string{"usernet.network": "web", "usernet.subnet": "10.200.7.0/24", "usernet.publish": "127.0.0.1:8080:80"})
	b.works(first)
	one := "web usermode 10.200.7.0/24 1400 h-one 10.200.7.2/24 127.0.0.1:8080:80/tcp\n" // the daemon's defaults count
	b.is(one)
	b.works(first)
	second := b.container("two", map[string]string{"usernet.network": "web"})
	b.works(second)
	if got := b.status(); !strings.Contains(got, "10.200.7.3/24") {
		t.Errorf("the second one: %s", got)
	}
	b.works(stopped(second))
	b.works(stopped(second))
	b.is(one)
	b.works(stopped(first))
	b.is("")
	b.works(stopped(b.of("never", 0, nil)))
}

func TestHookInANamespaceThatIsShared(t *testing.T) {
	b := newBench(t)
	pod := b.container("pod", map[string]string{"usernet.network": "web", "usernet.subnet": "10.200.7.0/24", "usernet.publish": "127.0.0.1:8080:80"})
	b.works(pod)
	alone := "web usermode 10.200.7.0/24 1400 h-pod 10.200.7.2/24 127.0.0.1:8080:80/tcp"
	side := b.of("side", pod.Pid, map[string]string{"usernet.publish": "127.0.0.1:8081:80"})
	for range 2 {
		b.works(side)
		b.is(alone + " 127.0.0.1:8081:80/tcp\n")
	}
	b.works(stopped(side))
	b.works(stopped(side))
	b.is(alone + "\n")
	b.works(side)
	b.works(stopped(pod)) // takes the interface with it
	b.is("")
	b.works(stopped(side))
	files, err := os.ReadDir(filepath.Join(b.dir, "run"))
	if err != nil || len(files) > 0 {
		t.Errorf("files %v, %v", files, err)
	}
}

// An engine's endpoint in the namespace is shared as well, and is not the hook's to take away.
func TestHookLeavesOthersAlone(t *testing.T) {
	b := newBench(t)
	st := b.container("one", nil)
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", st.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	engines := driver.Attachment{
		Network: usernet.Network{
			ID: strings.Repeat("e", 64), Options: usernet.Options{Mode: usernet.Usermode, ICC: true},
			Subnets: []usernet.Subnet{{Prefix: netip.MustParsePrefix("10.200.8.0/24"), Gateway: netip.MustParseAddr("10.200.8.1")}},
		},
		NetworkName: "engine", Endpoint: usernet.Endpoint{ID: endpointID(st, "eth0")[:63] + "x", IfName: "eth0"},
		Container: driver.Container{ID: "one", Name: "engines"}, Netns: ns,
	}
	if _, err := b.d.Attach(b.Context(), engines); err != nil {
		t.Fatal(err)
	}
	want := "engine usermode 10.200.8.0/24 1500 engines 10.200.8.2/24\n"
	b.works(st)
	b.is(want)
	b.works(stopped(st))
	b.is(want)
}

func TestHookRefuses(t *testing.T) {
	b := newBench(t)
	for _, tt := range []struct {
		name string
		st   state
		want string
	}{
		{"our own namespace", b.of("one", os.Getpid(), nil), "the hook runs in its network namespace"},
		{"no process", b.of("two", 1<<22-1, nil), "open the network namespace of container two"},
		{"what the daemon refuses", b.container("three", map[string]string{"usernet.ip": "10.200.7.300"}), "want an address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := b.hook(tt.st); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	b.is("")
}

// TestNetns expects what genuinetools/netns' own tests do.
func TestNetns(t *testing.T) {
	b := newBench(t)
	var out bytes.Buffer
	tool := Netns{
		Bridge: "netns0", Address: "172.19.0.1/16", Interface: "eth0", IPFile: ".ip",
		Daemon: b.daemon, RunDir: filepath.Join(b.dir, "run"), Stdout: &out,
	}
	addr := func(st state) string {
		t.Helper()
		text, err := json.Marshal(st.State)
		if err != nil {
			t.Fatal(err)
		}
		n := tool
		n.Stdin = bytes.NewReader(text)
		if err := n.Hook(b.Context()); err != nil {
			t.Fatal(err)
		}
		ip, _ := os.ReadFile(filepath.Join(st.Bundle, ".ip"))
		return string(ip)
	}
	one, two := b.container("one", map[string]string{"usernet.nonsense": "x"}), b.container("two", nil)
	if a, b := addr(one), addr(two); a != "172.19.0.2" || b != "172.19.0.3" {
		t.Errorf("addresses %s and %s", a, b)
	}
	if a := addr(one); a != "172.19.0.2" {
		t.Errorf("again: %s", a)
	}
	if err := tool.List(b.Context()); err != nil {
		t.Error(err)
	}
	for i, want := range []string{"", fmt.Sprintf("172.19.0.2 %d running", one.Pid), fmt.Sprintf("172.19.0.3 %d running", two.Pid)} {
		f := strings.Fields(strings.Split(out.String(), "\n")[i])
		if i > 0 && (len(f) != 5 || f[0]+" "+f[2]+" "+f[3] != want) {
			t.Errorf("ls: %q, want %q", f, want)
		}
	}
	if err := tool.Remove(b.Context()); err == nil {
		t.Error("the bridge was removed while containers are on it")
	}
	for _, st := range []state{one, two} {
		if ip := addr(stopped(st)); ip != "" {
			t.Errorf("the address file says %s after the container's end", ip)
		}
	}
	for _, tt := range []struct {
		name, address, want string
	}{
		{"", "172.19.0.1/16", "name cannot be empty"},
		{"testing0", "", "ip address cannot be empty"},
		{"testing0", "172.19.0.1", "want one such as"},
	} {
		n := tool
		n.Bridge, n.Address = tt.name, tt.address
		if err := n.Create(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("create %q %q: %v", tt.name, tt.address, err)
		}
	}
	made := tool
	made.Bridge = "testing0"
	for range 2 {
		if err := made.Create(); err != nil {
			t.Error(err)
		}
	}
	if l, err := netlink.LinkByName("testing0"); err != nil || l.Attrs().MTU != 1500 {
		t.Errorf("bridge %v, %v", l, err)
	}
	if err := made.Remove(b.Context()); err != nil {
		t.Error(err)
	}
	if err := made.Remove(b.Context()); err == nil {
		t.Error("a bridge that is not there was removed")
	}
}
