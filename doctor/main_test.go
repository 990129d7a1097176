package doctor

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/internal/nettest"
)

// The test binary is also the programs that the tests need.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if program, ok := programs[os.Args[1]]; ok {
			if err := program(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(nettest.Main(m))
}

var programs = map[string]func(args []string) error{
	ProbeCommand: func(args []string) error { return Probe(context.Background(), args, os.Stdout) },
	// examine prints what Examine finds for whoever it runs as.
	"examine": func([]string) error {
		return json.NewEncoder(os.Stdout).Encode(Examine(context.Background(), testConfig()))
	},
	// forbidden does the same for the check of user namespaces, where an administrator allows none.
	"forbidden": func([]string) error {
		if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
			return err
		}
		m := newMachine(testConfig())
		m.uid = 1000
		return json.NewEncoder(os.Stdout).Encode(examine(context.Background(), m, only("user namespaces", "trial network")))
	},
	// listen is a daemon's socket, and version its version.
	"listen": func(args []string) error {
		l, err := net.Listen("unix", args[0])
		if err != nil {
			return err
		}
		fmt.Println("ready")
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			c.Close()
		}
	},
	"version": func([]string) error { _, err := fmt.Println("usernet v9.9"); return err },
}

// testConfig is that of a machine without a daemon.
func testConfig() Config {
	return Config{
		Version: "v1", Daemon: config.DefaultDaemon(), File: "/etc/usernet/usernet.conf",
		Probe: []string{"/proc/self/exe", ProbeCommand}, Ask: noDaemon,
	}
}

func noDaemon(context.Context, string) (Daemon, error) { return Daemon{}, fs.ErrNotExist }

// only are the checks of the names.
func only(names ...string) []check {
	var cs []check
	for _, c := range checks {
		for _, name := range names {
			if c.name == name {
				cs = append(cs, c)
			}
		}
	}
	return cs
}

// world is a pretend machine.
type world struct {
	files    map[string]string // a content that begins with #! is a program
	commands map[string]string // what programs print, by their command line; "!" in front: and then fail
	env      map[string]string
	results  results // of the trials; nil: they were refused
	root     bool
}

func (w world) machine() *machine {
	m := newMachine(testConfig())
	m.self, m.uid, m.gid, m.patience = "/opt/usernet", 1000, 1000, 30*time.Second
	if w.root {
		m.uid, m.gid = 0, 0
	}
	files := fstest.MapFS{}
	for name, text := range w.files {
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(text, "#!") {
			mode = 0o755
		}
		files[rel(name)] = &fstest.MapFile{Data: []byte(text), Mode: mode}
	}
	m.root = files
	m.getenv = func(name string) string {
		if name == "PATH" {
			return "/usr/bin:/bin"
		}
		return w.env[name]
	}
	m.run = func(_ context.Context, name string, args ...string) (string, error) {
		line := strings.Join(append([]string{name}, args...), " ")
		text, ok := w.commands[line]
		if !ok {
			return "", fmt.Errorf("unexpected command %s", line)
		}
		if failure, bad := strings.CutPrefix(text, "!"); bad {
			return failure, fmt.Errorf("exit status 1: %s", failure)
		}
		return text, nil
	}
	for _, t := range []*trial{&m.user, &m.privileged} {
		t.get(func() trialResult {
			if w.results == nil {
				return trialResult{err: syscall.EPERM}
			}
			return trialResult{results: w.results}
		})
	}
	return m
}

// works is a trial in which everything went well, but for some experiments.
func works(but map[string]string) results {
	rs := results{}
	for _, name := range []string{tryLinks, tryTUN, tryOffload, tryNftables, trySocket, tryTProxy, tryIptables, tryIP6tables, tryConntrack,
		tryUsermode, tryFast, trySource} {
		rs[name] = result{}
	}
	for name, why := range but {
		rs[name] = result{Err: why}
	}
	return rs
}

// answer is what a check has to say of a world.
type answer struct {
	name   string
	world  world
	status Status // "": the check has nothing to say
	detail string // a part of it
	fix    string // a part of it; "": there is none
}

func (a answer) check(t *testing.T, look func(*machine, context.Context) (finding, bool)) {
	t.Run(a.name, func(t *testing.T) {
		a.compare(t, a.world.machine(), look)
	})
}

func (a answer) compare(t *testing.T, m *machine, look func(*machine, context.Context) (finding, bool)) {
	t.Helper()
	f, ok := look(m, t.Context())
	switch {
	case !ok && a.status != "":
		t.Errorf("nothing to say, want %q", a.status)
	case ok && f.status != a.status, !strings.Contains(f.detail, a.detail), !strings.Contains(f.fix, a.fix), a.fix == "" && f.fix != "":
		t.Errorf("got  %q %q, fix %q\nwant %q %q, fix %q", f.status, f.detail, f.fix, a.status, a.detail, a.fix)
	}
}

// sysctls are files below /proc/sys.
func sysctls(pairs ...string) map[string]string {
	files := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		files["/proc/sys/"+pairs[i]] = pairs[i+1] + "\n"
	}
	return files
}

func join(all ...map[string]string) map[string]string {
	sum := map[string]string{}
	for _, files := range all {
		maps.Copy(sum, files)
	}
	return sum
}

// self runs the test binary as one of programs and returns what it prints.
func self(t *testing.T, attr *syscall.SysProcAttr, args ...string) []Finding {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "TMPDIR=/tmp", "HOME=/nonexistent")
	cmd.SysProcAttr = attr
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	var all []Finding
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// find is the finding of a name.
func find(t *testing.T, all []Finding, name string) Finding {
	t.Helper()
	for _, f := range all {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("no finding about %s in %v", name, all)
	return Finding{}
}

func want(t *testing.T, all []Finding, name string, s Status, part string) {
	t.Helper()
	f := find(t, all, name)
	if f.Status != s || !strings.Contains(f.Detail+cmp.Or(f.Fix, "-"), part) {
		t.Errorf("%s: %s: %s (%s); want %s: %s", name, f.Status, f.Detail, f.Fix, s, part)
	}
}

// start runs a program that prints a line when it is ready, until the end of the test.
func start(t *testing.T, program string, args ...string) {
	t.Helper()
	cmd := exec.Command(program, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}
