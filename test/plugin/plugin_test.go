// Package plugin_test runs usernet as a managed plugin of real Docker engines: made by dist/plugin.sh, created, enabled,
// killed, restarted with Docker and removed.
package plugin_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/test/engine"
)

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

var (
	host = engine.HostAddr.Addr().String()
	far  = engine.FarAddr.String()
)

func TestPlugin(t *testing.T) {
	engine.Each(t, func(t *testing.T, e *engine.Engine) {
		logs := e.LogSizes()
		defer func() {
			if t.Failed() {
				t.Logf("logs:\n%s", e.LogsSince(logs))
			}
		}()
		(&rig{t, e}).life()
	})
}

// rig is a test with its engine.
type rig struct {
	*testing.T
	e *engine.Engine
}

// networks are one of each kind, with the container on it and its published port.
var networks = []struct {
	mode, name, container, port string
}{
	{"usermode", "quiet", "quiet-www", "8080"},
	{"bridge", "bridged", "bridged-www", "8081"},
}

// life is what a plugin sees from its creation to its end.
func (r *rig) life() {
	dir := filepath.Join(r.e.Dir, "plugin")
	if out, err := exec.Command("../../dist/plugin.sh", dir).CombinedOutput(); err != nil {
		r.Fatalf("dist/plugin.sh: %v: %s", err, out)
	}
	before := r.snapshot()
	r.docker("plugin", "create", "usernet", dir)
	r.docker("plugin", "enable", "usernet")
	for _, n := range networks {
		r.docker("network", "create", "-d", "usernet:latest", "-o", "mode="+n.mode, n.name)
		r.docker("run", "-d", "--name", n.container, "--network", n.name, "-p", n.port+":80", engine.Image)
	}
	r.works("at first")

	pins, first := r.pins(), r.process()
	if len(pins) == 0 {
		r.Error("the namespace of the usermode network is not pinned where the host sees it")
	}
	if _, err := r.e.Run(r.Context(), "sh", "-c", "kill -KILL "+first); err != nil {
		r.Fatal(err)
	}
	r.works("after the plugin was killed")
	if again := r.process(); again == first {
		r.Errorf("process %s was not killed", first)
	}
	if again := r.pins(); !slices.Equal(again, pins) {
		r.Errorf("pins after the plugin was killed: %q, want %q", again, pins)
	}

	if err := r.e.RestartDaemon(r.Context(), "--live-restore"); err != nil {
		r.Fatal(err)
	}
	for _, n := range networks {
		r.docker("start", n.container)
	}
	r.works("after a restart of Docker")

	if err := r.e.KillDaemon(); err != nil {
		r.Fatal(err)
	}
	if err := r.e.StartDaemon(r.Context(), "--live-restore"); err != nil {
		r.Fatal(err)
	}
	r.works("after Docker was killed, with live-restore")

	for _, n := range networks {
		r.docker("rm", "-f", n.container)
		r.docker("network", "rm", n.name)
	}
	r.docker("plugin", "disable", "usernet")
	r.docker("plugin", "rm", "usernet")
	if d := before.Diff(r.snapshot()); d != "" {
		r.Errorf("left behind:\n%s", d)
	}
}

// works checks that traffic goes in and out of the containers and that the control socket is where users look for it.
// A plugin that was killed gets a few seconds: Docker restarts it.
func (r *rig) works(when string) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), 15*time.Second)
	defer cancel()
	for _, n := range networks {
		for _, addr := range []string{"127.0.0.1:" + n.port, host + ":" + n.port} {
			var page string
			r.eventually(ctx, when+", "+addr, func() (err error) {
				page, err = engine.Get(ctx, r.e.NS(), addr)
				return err
			})
			if !strings.HasPrefix(page, "hello from") {
				r.Errorf("%s: %s: page %q", when, addr, page)
			}
		}
		r.eventually(ctx, when+", out of "+n.container, func() error {
			_, err := r.e.Docker(ctx, "exec", n.container, "probe", "fetch", "http://"+far+"/")
			return err
		})
	}
	out, err := r.e.Usernet(ctx, "ps")
	if err != nil || !strings.Contains(out, ":8080->80/tcp") || !strings.Contains(out, ":8081->80/tcp") {
		r.Errorf("%s: usernet ps: %v:\n%s", when, err, out)
	}
}

// eventually repeats what may not work yet. There is no event to wait for: Docker says nothing when it has restarted a
// plugin.
func (r *rig) eventually(ctx context.Context, what string, do func() error) {
	r.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := do()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			r.Fatalf("%s: %v", what, err)
		case <-tick.C:
		}
	}
}

func (r *rig) docker(args ...string) {
	r.Helper()
	if _, err := r.e.Docker(r.Context(), args...); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) snapshot() engine.Snapshot {
	r.Helper()
	s, err := r.e.Snapshot(r.Context())
	if err != nil {
		r.Fatal(err)
	}
	return s
}

// process is the ID of the plugin's process, as the pretend host counts.
func (r *rig) process() string {
	r.Helper()
	names, err := filepath.Glob(r.e.Path("/proc/[0-9]*/comm"))
	if err != nil {
		r.Fatal(err)
	}
	var found []string
	for _, name := range names {
		if comm, err := os.ReadFile(name); err == nil && string(comm) == "usernet\n" {
			found = append(found, filepath.Base(filepath.Dir(name)))
		}
	}
	if len(found) != 1 {
		r.Fatalf("processes of the plugin: %q, want one", found)
	}
	return found[0]
}

// pins are the network namespaces that the pretend host sees pinned in the plugin's directory, with the inodes that tell
// them apart.
func (r *rig) pins() []string {
	r.Helper()
	out, err := r.e.Run(r.Context(), "cat", "/proc/1/mountinfo")
	if err != nil {
		r.Fatal(err)
	}
	var pins []string
	for l := range strings.Lines(out) {
		// The fourth field is the namespace, the fifth where it is mounted.
		if f := strings.Fields(l); len(f) > 4 && strings.HasPrefix(f[3], "net:") && strings.Contains(f[4], "/propagated-mount/") {
			pins = append(pins, f[3]+" "+f[4])
		}
	}
	slices.Sort(pins)
	return pins
}
