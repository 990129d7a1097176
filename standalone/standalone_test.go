package standalone

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/nettest"
)

// actAs makes this program something else: run, a usernet run of the given command; or one of the commands that are run.
const actAs = "USERNET_TEST_ACT"

func TestMain(m *testing.M) {
	if helper := Helper(os.Args[1:]); helper != nil {
		if err := helper(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	switch os.Getenv(actAs) {
	case "run":
		os.Unsetenv(actAs)
		outer()
	case "serve":
		serve()
	case "":
		os.Exit(nettest.Main(m))
	}
}

// outer is a usernet run of the arguments, with the ports that the environment tells.
func outer() {
	var ports []usernet.Port
	for _, p := range strings.Fields(os.Getenv("PORTS")) {
		at := netip.MustParseAddrPort(p)
		ports = append(ports, usernet.Port{Proto: usernet.TCP, HostIP: at.Addr(), HostPort: at.Port(), HostPortEnd: at.Port(), ContainerPort: 80})
	}
	addr4, addr6 := netip.MustParseAddr("10.200.50.2"), netip.MustParseAddr("fd00:200:50::2")
	if os.Getenv("SHARE") != "" {
		addr4, addr6 = netip.Addr{}, netip.Addr{}
	}
	status, err := Run(Config{
		Command: os.Args[1:],
		Network: usernet.Network{ID: "test", IPv6: true, Subnets: []usernet.Subnet{
			{Prefix: netip.MustParsePrefix("10.200.50.0/24"), Gateway: netip.MustParseAddr("10.200.50.1")},
			{Prefix: netip.MustParsePrefix("fd00:200:50::/64"), Gateway: netip.MustParseAddr("fd00:200:50::1")},
		}, Options: usernet.Options{Mode: usernet.Usermode, ICC: true, FastPath: true}},
		Addr4: addr4, Addr6: addr6,
		Share: os.Getenv("SHARE"), Hostname: os.Getenv("NAME"),
		Ports: ports, NoEgress: os.Getenv("NOEGRESS") != "", Keep: os.Getenv("KEEP") != "",
		Log:   slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
	})
	if start, ok := errors.AsType[*StartError](err); ok {
		fmt.Println("not started:", start.Errno)
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(125)
	}
	if status.Signaled() {
		fmt.Println("signal:", status.Signal())
		os.Exit(0)
	}
	os.Exit(status.ExitStatus())
}

// serve tells every client of port 80 who it is.
func serve() {
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(1)
		}
		fmt.Fprintln(c, c.RemoteAddr().(*net.TCPAddr).IP)
		c.Close()
	}
}

// who are the callers that everything is tried as.
var who = map[string]*syscall.Credential{"root": nil, "ordinary": {Uid: 65534, Gid: 65534, NoSetGroups: true}}

// world makes the host: with an address outside of its loopback, and a TUN driver that everybody may use.
func world(t *testing.T) {
	t.Helper()
	nettest.Veth(t, "host0", netip.MustParsePrefix("198.51.100.1/24"), nettest.NewNS(t), "far0", netip.MustParsePrefix("198.51.100.2/24"))
	tun := filepath.Join(t.TempDir(), "tun")
	if err := unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		t.Fatal(err)
	}
	os.Chmod(tun, 0o666)
	if err := unix.Mount(tun, "/dev/net/tun", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount("/dev/net/tun", unix.MNT_DETACH) })
}

// command is a usernet run by caller of a shell command.
func command(t *testing.T, caller *syscall.Credential, env []string, script string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Where an ordinary user may run it.
	path := filepath.Join(open(t), "run")
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "sh", "-c", script)
	cmd.Env = append(append(os.Environ(), actAs+"=run", "TMPDIR=/tmp"), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: caller}
	cmd.Stderr = os.Stderr
	return cmd
}

// open is a directory that everybody may enter.
func open(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "usernet-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	return dir
}

func each(t *testing.T, test func(t *testing.T, caller *syscall.Credential)) {
	for name, caller := range who {
		t.Run(name, func(t *testing.T) {
			world(t)
			test(t, caller)
			if left := inners(t); left != "" {
				t.Errorf("processes are left: %s", left)
			}
		})
	}
}

// inners are the inner processes that there are.
func inners(t *testing.T) string {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left = left[:0]
		lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, f := range lines {
			b, _ := os.ReadFile(f)
			if (bytes.Contains(b, []byte("\x00"+innerCommand)) || bytes.Contains(b, []byte("\x00"+holderCommand))) && ours(filepath.Dir(f)) {
				left = append(left, string(b))
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return strings.Join(left, ", ")
		}
	}
}

// ours tells whether a process descends from this one; others test here, too.
func ours(proc string) bool {
	for range 8 {
		b, err := os.ReadFile(proc + "/stat")
		if err != nil {
			return false
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if f[1] == fmt.Sprint(os.Getpid()) {
			return true
		}
		proc = "/proc/" + f[1]
	}
	return false
}

func TestStatusAndIdentity(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		out, err := command(t, caller, nil, "id -u; echo hello; exit 7").Output()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 7 {
			t.Errorf("ended with %v, want status 7", err)
		}
		if string(out) != "0\nhello\n" {
			t.Errorf("printed %q", out)
		}
		out, err = command(t, caller, []string{"KEEP=1"}, "id -u; id -g").Output()
		self, _ := user.Current()
		want := self.Uid + "\n" + self.Gid + "\n"
		if caller != nil {
			want = "65534\n65534\n"
		}
		if err != nil || string(out) != want {
			t.Errorf("as the caller: %q, %v, want %q", out, err, want)
		}
		cmd := command(t, caller, nil, "")
		cmd.Args = []string{cmd.Path, "no-such-command"}
		if out, err := cmd.Output(); err != nil || string(out) != "not started: "+unix.ENOENT.Error()+"\n" {
			t.Errorf("a command that there is not: %q, %v", out, err)
		}
		if out, err := command(t, caller, nil, "kill -KILL $$").Output(); err != nil || string(out) != "signal: killed\n" {
			t.Errorf("a killed command: %q, %v", out, err)
		}
	})
}

func TestSignalIsTheCommands(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		cmd := command(t, caller, nil, "trap 'echo told; exit 3' TERM; echo ready; while :; do read x; done")
		stdin, _ := cmd.StdinPipe()
		defer stdin.Close()
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		lines.Scan()
		cmd.Process.Signal(unix.SIGTERM)
		io.WriteString(stdin, "\n") // a shell runs its traps between commands
		if !lines.Scan() || lines.Text() != "told" {
			t.Errorf("after the signal: %q", lines.Text())
		}
		err = cmd.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 3 {
			t.Errorf("ended with %v, want status 3", err)
		}
	})
}

// Killed at any moment, the outer process takes all with it.
func TestKilledOuterLeavesNothing(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		for _, after := range []time.Duration{0, 5 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond, time.Second} {
			cmd := command(t, caller, nil, "echo ready; sleep 60")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if after == time.Second {
				bufio.NewScanner(out).Scan()
			} else {
				time.Sleep(after)
			}
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
}

// fetch gets one line from a server of the script below.
func fetch(t *testing.T, at string) string {
	t.Helper()
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", at, time.Second); err != nil {
			continue
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		var b []byte
		b, err = io.ReadAll(c)
		c.Close()
		if err == nil && len(b) > 0 {
			return string(b)
		}
	}
	t.Fatalf("%s: %v", at, err)
	return ""
}

// A published port is there on every address that was named, and what it shows of the client is true.
func TestPublishedPort(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		const at = "198.51.100.1:18080"
		cmd := command(t, caller, []string{"PORTS=" + at + " 127.0.0.1:18080 [::1]:18080"}, actAs+"=serve exec $SELF")
		cmd.Env = append(cmd.Env, "SELF="+cmd.Path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { cmd.Process.Signal(unix.SIGTERM); cmd.Wait() }()
		for at, client := range map[string]string{
			at: "198.51.100.1", "127.0.0.1:18080": "10.200.50.1", "[::1]:18080": "fd00:200:50::1", // the gateway for clients on loopback
		} {
			if got := fetch(t, at); got != client+"\n" {
				t.Errorf("%s: the command saw %q, want %s", at, got, client)
			}
		}
	})
}

func TestPortTaken(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		l, err := net.Listen("tcp", "127.0.0.1:18081")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		cmd := command(t, caller, []string{"PORTS=127.0.0.1:18081"}, "echo started")
		var told bytes.Buffer
		cmd.Stderr = &told
		out, err := cmd.Output()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 125 || len(out) > 0 {
			t.Errorf("ended with %v, printed %q", err, out)
		}
		if !strings.Contains(told.String(), usernet.ErrPortTaken.Error()) {
			t.Errorf("told %q", told.String())
		}
	})
}

// Out, to the host's own address: TCP, names of the network, and nothing with NoEgress.
func TestEgress(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		l, err := net.Listen("tcp4", "198.51.100.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, "outside\n")
				c.Close()
			}
		}()
		port := fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
		reach := "busybox nc -w 5 198.51.100.1 " + port + " </dev/null || echo refused"
		if out, err := command(t, caller, nil, reach).Output(); err != nil || string(out) != "outside\n" {
			t.Errorf("reached %q, %v", out, err)
		}
		if out, err := command(t, caller, []string{"NOEGRESS=1"}, reach).Output(); err != nil || string(out) != "refused\n" {
			t.Errorf("without egress, reached %q, %v", out, err)
		}
		out, err := command(t, caller, nil, "cat /etc/resolv.conf; busybox nslookup gateway.containers.internal 10.200.50.1").Output()
		if !strings.HasPrefix(string(out), "nameserver 10.200.50.1\nnameserver fd00:200:50::1\n") || !strings.Contains(string(out), "gateway.containers.internal") {
			t.Errorf("names: %q, %v", out, err)
		}
	})
}

// Several commands on one network reach each other by name, have addresses of their own, and leave nothing.
func TestShare(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		dir := open(t)
		if caller != nil {
			os.Chown(dir, int(caller.Uid), int(caller.Gid))
		}
		env := []string{"XDG_RUNTIME_DIR=" + dir, "SHARE=net"}
		var servers []*exec.Cmd
		for i, name := range []string{"one", "two", "three"} {
			cmd := command(t, caller, append(env, "NAME="+name, fmt.Sprintf("PORTS=127.0.0.1:%d", 18090+i)), actAs+"=serve exec $SELF")
			cmd.Env = append(cmd.Env, "SELF="+cmd.Path)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			servers = append(servers, cmd)
		}
		for i := range servers {
			if got := fetch(t, fmt.Sprintf("127.0.0.1:%d", 18090+i)); got != "10.200.50.1\n" {
				t.Errorf("command %d saw %q", i, got)
			}
		}
		out, err := command(t, caller, env, "for n in one two three; do busybox nc -w 5 $n 80 </dev/null; done; busybox ip -o addr show eth0").Output()
		lines := strings.Split(string(out), "\n")
		if err != nil || len(lines) < 4 || lines[0] == "10.200.50.1" || lines[0] != lines[1] || lines[1] != lines[2] || !strings.Contains(string(out), lines[0]+"/") {
			t.Errorf("the neighbours say %q, %v", out, err)
		}
		for _, s := range servers {
			s.Process.Signal(unix.SIGTERM)
			s.Wait()
		}
		entries, _ := filepath.Glob(dir + "/usernet/share/*.sock")
		for deadline := time.Now().Add(5 * time.Second); len(entries) > 0 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			entries, _ = filepath.Glob(dir + "/usernet/share/*.sock")
		}
		if len(entries) > 0 {
			t.Errorf("sockets are left: %v", entries)
		}
	})
}

// Fifty at once, alone and on one network: all work, no address is given twice, and nothing is left.
func TestManyAtOnce(t *testing.T) {
	each(t, func(t *testing.T, caller *syscall.Credential) {
		dir := open(t)
		if caller != nil {
			os.Chown(dir, int(caller.Uid), int(caller.Gid))
		}
		const many = 50
		first := command(t, caller, nil, "")
		for _, share := range []string{"", "SHARE=net"} {
			addrs := make([]string, many)
			var all, up sync.WaitGroup
			up.Add(many)
			for i := range many {
				all.Go(func() {
					told := sync.OnceFunc(up.Done)
					defer told()
					cmd := exec.Command(first.Path, "sh", "-c", "busybox ip -4 -o addr show eth0; read go")
					cmd.Env = append(append([]string(nil), first.Env...), "XDG_RUNTIME_DIR="+dir, share)
					cmd.SysProcAttr = first.SysProcAttr
					cmd.Stderr = os.Stderr
					stdin, _ := cmd.StdinPipe()
					stdout, _ := cmd.StdoutPipe()
					if err := cmd.Start(); err != nil {
						t.Errorf("command %d: %v", i, err)
						return
					}
					line, _ := bufio.NewReader(stdout).ReadString('\n')
					if f := strings.Fields(line); len(f) > 3 {
						addrs[i] = f[3]
					}
					told()
					up.Wait() // all of them are there at the same time
					io.WriteString(stdin, "\n")
					if err := cmd.Wait(); err != nil {
						t.Errorf("command %d: %v", i, err)
					}
				})
			}
			all.Wait()
			used := map[string]bool{}
			for i, a := range addrs {
				if a == "" || used[a] && share != "" {
					t.Errorf("%s: command %d has the address %q", share, i, a)
				}
				used[a] = true
			}
		}
	})
}

// In a directory that somebody else made, or may write in, another socket could be put in place of ours.
func TestShareDirIsTheUsersOwn(t *testing.T) {
	dir := t.TempDir()
	for name, spoil := range map[string]func(path string) error{
		"foreign":  func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chown(path, 65534, 65534)) },
		"writable": func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, 0o777)) },
		"link":     func(path string) error { return os.Symlink(dir, path) },
	} {
		path := filepath.Join(dir, name)
		if err := spoil(path); err != nil {
			t.Fatal(err)
		}
		if err := ownDir(path); err == nil {
			t.Errorf("%s: taken for the user's own", name)
		}
	}
	if err := ownDir(t.TempDir()); err != nil {
		t.Error(err)
	}
}
