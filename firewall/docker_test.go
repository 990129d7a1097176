package firewall

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// engine is a dockerd in the test's namespace.
type engine struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

// start runs dockerd until stop, and returns when it is ready.
func (e *engine) start() {
	e.t.Helper()
	path := filepath.Join(e.dir, "notify")
	os.Remove(path)
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		e.t.Fatal(err)
	}
	defer ready.Close()
	log, err := os.Create(filepath.Join(e.dir, "log"))
	if err != nil {
		e.t.Fatal(err)
	}
	defer log.Close()
	e.cmd = exec.Command("dockerd", "--data-root", e.dir+"/data", "--exec-root", e.dir+"/exec", "--pidfile", e.dir+"/pid",
		"-H", "unix://"+e.dir+"/sock", "--storage-driver", "vfs", "--bip", "10.200.9.1/24",
		"--default-address-pool", "base=10.201.0.0/16,size=24")
	e.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	e.cmd.Stdout, e.cmd.Stderr = log, log
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(e.stop)
	ready.SetReadDeadline(time.Now().Add(time.Minute))
	b := make([]byte, 128)
	for {
		n, err := ready.Read(b)
		if err != nil {
			out, _ := os.ReadFile(log.Name())
			e.t.Fatalf("dockerd is not ready: %v\n%s", err, out)
		}
		if strings.Contains(string(b[:n]), "READY=1") {
			return
		}
	}
}

func (e *engine) stop() {
	if e.cmd != nil {
		e.cmd.Process.Signal(syscall.SIGTERM)
		e.cmd.Wait()
		e.cmd = nil
	}
}

func (e *engine) docker(args string) {
	e.t.Helper()
	run(e.t, "docker -H unix://"+e.dir+"/sock "+args)
}

// Docker's rules and ours on one host, whoever comes first: a real dockerd, with pretend containers on its bridge.
func TestDocker(t *testing.T) {
	dir, err := os.MkdirTemp("/run", "docker") // short enough for unix sockets
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	run(t, "ip link del foreign0")
	t.Cleanup(func() { cleanTables(t) })
	run(t, "iptables -P FORWARD DROP")
	e := &engine{t: t, dir: dir}
	e.start()
	h.f1 = h.container("docker0", "10.200.9.2", "fd00:9::2")
	h.serveAll()
	fw := newFirewall(t)
	state := h.both()
	state.Foreign = []string{"docker0"}
	before := list(t, "iptables")

	check := func(name string, wantRepair bool) {
		t.Run(name, func(t *testing.T) {
			if repaired, err := fw.Check(); err != nil || repaired != wantRepair {
				t.Errorf("Check = %t, %v; want %t", repaired, err, wantRepair)
			}
			h.checkDocker(t)
		})
	}
	set(t, fw, state)
	check("we come second", false)
	e.docker("network create other")
	check("Docker makes a network", true) // Docker's masquerade is put above our jump
	e.stop()
	e.start() // with a new docker0
	h.f1 = h.container("docker0", "10.200.9.3", "fd00:9::3")
	h.f1.serve(t, "f1", 80)
	check("Docker restarts", true)
	e.docker("network rm other")
	if _, err := fw.Check(); err != nil {
		t.Fatal(err)
	}
	if err := fw.Close(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, list(t, "iptables")); d != "" {
		t.Errorf("Docker's rules after ours are gone (-before +after):\n%s", d)
	}
}

// checkDocker is the IPv4 traffic that must and must not pass between our networks, Docker's, and the outside.
func (h *host) checkDocker(t *testing.T) {
	at := *h
	h, at.t = &at, t
	me := hostAddr(false)
	h.reaches(h.client, me, 8080, fmt.Sprint("a1 saw ", h.client.v4))
	h.reaches(h.a1, h.a2.v4, 80, fmt.Sprint("a2 saw ", h.a1.v4))
	h.reaches(h.a1, h.client.v4, 80, fmt.Sprint("client saw ", me))
	h.reaches(h.f1, h.client.v4, 80, fmt.Sprint("client saw ", me))
	h.dropped(h.a1, h.f1.v4, 80)
	h.dropped(h.f1, h.a1.v4, 80)
	h.dropped(h.a1, h.b1.v4, 80)
	h.dropped(h.client, h.a1.v4, 80)
	// A published port is for everybody, Docker's containers too.
	h.reaches(h.f1, me, 8080, "a1 saw 10.200.1.1")
}

// cleanTables takes Docker's rules out of the test's namespace; dockerd leaves them there.
func cleanTables(t *testing.T) {
	for _, table := range []string{"mangle", "nat", "filter"} {
		run(t, "iptables -t "+table+" -F")
		run(t, "iptables -t "+table+" -X")
	}
	run(t, "iptables -P FORWARD ACCEPT")
	for _, line := range strings.Split(run(t, "ip -o link show type bridge"), "\n") {
		if f := strings.Fields(line); len(f) > 1 && (strings.HasPrefix(f[1], "br-") || f[1] == "docker0:") {
			run(t, "ip link del "+strings.TrimSuffix(f[1], ":"))
		}
	}
}
