package doctor

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest"
)

var nobody = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}

// withTUN puts another /dev/net/tun in the place of this one, in the mount namespace of the tests.
func withTUN(t *testing.T, mode os.FileMode) {
	t.Helper()
	node := filepath.Join(t.TempDir(), "tun")
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 200))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(node, mode); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(node, "/dev/net/tun", "none", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/dev/net/tun", 0); err != nil {
			t.Error(err)
		}
	})
}

// Everything that the trial tries works where the tests run; other packages' tests need it.
func tried(t *testing.T, all []Finding) {
	t.Helper()
	for _, name := range []string{"TUN device", "large packets", "nftables", "client addresses", "fast path", "iptables", "ip6tables", "conntrack",
		"user namespaces", "trial network"} {
		want(t, all, name, OK, "")
	}
}

func TestAsRoot(t *testing.T) {
	defer goleak.VerifyNone(t)
	nettest.NoLeaks(t)
	before := shell(t, "cat /proc/self/mounts; find /run")
	all := Examine(t.Context(), testConfig())
	tried(t, all)
	if !Works(all) {
		t.Error("usermode networks do not work")
	}
	want(t, all, "left-overs", OK, "none")
	// The links and open files are NoLeaks'.
	if after := shell(t, "cat /proc/self/mounts; find /run"); before != after {
		t.Errorf("mounts and /run before:\n%safter:\n%s", before, after)
	}
}

func TestAsOrdinaryUser(t *testing.T) {
	withTUN(t, 0o666)
	all := self(t, nobody, "examine")
	tried(t, all)
	want(t, all, "user namespaces", OK, "you may make them")
	want(t, all, "low ports", Info, "sudo sysctl -w net.ipv4.ip_unprivileged_port_start")
}

func TestAsOrdinaryUserWithoutTUN(t *testing.T) {
	withTUN(t, 0o600)
	all := self(t, nobody, "examine")
	want(t, all, "TUN device", Missing, "sudo chmod 0666 /dev/net/tun")
	want(t, all, "trial network", Missing, "permission denied")
	want(t, all, "nftables", OK, "")
}

func TestPingAsOrdinaryUser(t *testing.T) {
	const sysctl = "/proc/sys/net/ipv4/ping_group_range"
	for _, tt := range []struct {
		groups string
		status Status
		part   string
	}{
		{"1 0", Warning, "group 65534"},
		{"65534 65534", OK, ""},
		{"0 100", Warning, "net.ipv4.ping_group_range"},
	} {
		if err := os.WriteFile(sysctl, []byte(tt.groups), 0); err != nil {
			t.Fatal(err)
		}
		want(t, self(t, nobody, "examine"), "ping", tt.status, tt.part)
	}
	if err := os.WriteFile(sysctl, []byte("1 0"), 0); err != nil {
		t.Fatal(err)
	}
	(answer{status: OK, detail: "raw"}).compare(t, world{root: true}.machine(), (*machine).ping)
}

// An administrator who allows no user namespaces.
func TestForbiddenNamespaces(t *testing.T) {
	all := self(t, &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}, "forbidden")
	want(t, all, "user namespaces", Missing, "user.max_user_namespaces is 0")
	want(t, all, "user namespaces", Missing, "sudo sysctl -w user.max_user_namespaces=16384")
	want(t, all, "trial network", Missing, "user namespaces")
}

// Called by hand, Probe must not touch the namespaces it is in.
func TestProbeStaysOut(t *testing.T) {
	own, err := namespaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{nil, {"x"}, own, {"net:[1]", own[1]}, {own[0], "mnt:[1]"}} {
		var out strings.Builder
		if err := Probe(t.Context(), args, &out); err == nil || out.Len() > 0 {
			t.Errorf("Probe(%q): %v, %q", args, err, out.String())
		}
	}
}

// What never answers costs one check its patience, and no more.
func TestHangs(t *testing.T) {
	defer goleak.VerifyNone(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // nobody accepts: the kernel does, and keeps silent
	m := world{env: map[string]string{"DOCKER_HOST": "unix://" + socket}, files: map[string]string{
		"/usr/bin/podman": "#!", "/usr/bin/docker": "#!",
	}}.machine()
	m.patience = 300 * time.Millisecond
	m.run = func(ctx context.Context, _ string, _ ...string) (string, error) {
		return runCommand(ctx, "sleep", "600")
	}
	m.cfg.Probe = []string{"sleep", "600"}
	m.user, m.privileged, m.uid = trial{}, trial{}, 0
	m.cfg.Daemon.PluginSocket = socket
	m.cfg.Ask = func(ctx context.Context, _ string) (Daemon, error) { <-ctx.Done(); return Daemon{}, ctx.Err() }
	all := examine(t.Context(), m, checks)
	want(t, all, "Docker", Warning, "it takes too long")
	want(t, all, "Docker driver", Warning, "it takes too long")
	want(t, all, "Podman", Warning, "killed")
	want(t, all, "daemon", Warning, "it takes too long")
	want(t, all, "trial network", Missing, "sleep")
	if Works(all) {
		t.Error("usermode networks work although nothing could be tried")
	}
}

// The version is that of the program the daemon runs, whatever lies in its place now.
func TestVersionOfRunningDaemon(t *testing.T) {
	dir := t.TempDir()
	program, socket := filepath.Join(dir, "usernet"), filepath.Join(dir, "sock")
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, text, 0o755); err != nil {
		t.Fatal(err)
	}
	start(t, program, "listen", socket)
	m := newMachine(testConfig())
	m.cfg.Daemon.ControlSocket = socket
	(answer{status: Warning, detail: "the daemon is v9.9, this program is v1", fix: "systemctl restart usernet"}).compare(t, m, (*machine).version)
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	m.cfg.Version = "v9.9"
	(answer{status: OK, detail: "both v9.9"}).compare(t, m, (*machine).version)

	// Something else listens, as systemd does.
	other := filepath.Join(dir, "other")
	l, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m.cfg.Daemon.ControlSocket = other
	(answer{status: Info, detail: "this is v9.9"}).compare(t, m, (*machine).version)
}
