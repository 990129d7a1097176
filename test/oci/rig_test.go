package oci_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
)

// Addresses as they stand in URLs.
var (
	hostIP  = engine.HostAddr.Addr().String()
	hostIP6 = engine.HostAddr6.Addr().String()
	router  = engine.RouterAddr.Addr().String()
	far     = engine.FarAddr.String()
)

// rig is what a case has in hand: a pretend host, a runtime, the kind of network to ask for, and ways to do something and fail when
// that does not work.
type rig struct {
	*testing.T
	h       *engine.Host
	runtime string // runc or crun
	mode    string

	made []string // containers
}

// container is one bundle, and the container that is made from it.
type container struct {
	name        string
	args        []string          // what it runs; probe serve
	annotations map[string]string // without the prefix
	hook        []string          // the command line of the hook; usernet oci-hook
	stages      []string          // createRuntime and poststop
	joins       string            // the path of a network namespace
	rootfs      string            // everybody's
	hostname    string            // its name
	mounts      []mount
}

type mount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options"`
}

func (r *rig) usernetBin() string { return filepath.Join(r.h.Dir, "bin/usernet") }

// dir is a container's bundle.
func (r *rig) dir(name string) string { return filepath.Join(r.h.Dir, "bundles", name) }

func (r *rig) log(name string) string { return filepath.Join(r.dir(name), "log") }

// bundle writes a container's bundle. Annotations get the mode of the rig.
func (r *rig) bundle(c container) {
	r.Helper()
	if c.args == nil {
		c.args = []string{"/bin/probe", "serve"}
	}
	if c.hook == nil {
		c.hook = []string{r.usernetBin(), "oci-hook"}
	}
	if c.stages == nil {
		c.stages = []string{"createRuntime", "poststop"}
	}
	if c.rootfs == "" {
		c.rootfs = r.h.Rootfs()
	}
	if c.hostname == "" {
		c.hostname = c.name
	}
	annotations := map[string]string{"usernet.mode": r.mode, "org.example": "not ours"}
	for k, v := range c.annotations {
		annotations["usernet."+k] = v
	}
	// crun hides what hooks say.
	annotations["run.oci.hooks.stderr"] = r.log(c.name)
	if err := errors.Join(os.RemoveAll(r.dir(c.name)), os.MkdirAll(r.dir(c.name), 0o755)); err != nil {
		r.Fatal(err)
	}
	text, err := json.MarshalIndent(r.config(c, annotations), "", "  ")
	if err != nil {
		r.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir(c.name), "config.json"), text, 0o644); err != nil {
		r.Fatal(err)
	}
}

type object = map[string]any

func (r *rig) config(c container, annotations map[string]string) object {
	network := object{"type": "network"}
	if c.joins != "" {
		network["path"] = c.joins
	}
	hooks := object{}
	for _, stage := range c.stages {
		hooks[stage] = []object{{"path": c.hook[0], "args": c.hook}}
	}
	caps := []string{"CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_KILL"}
	return object{
		"ociVersion": "1.0.2",
		"process": object{
			"user": object{"uid": 0, "gid": 0}, "args": c.args, "cwd": "/", "env": []string{"PATH=/bin"},
			"capabilities": object{"bounding": caps, "effective": caps, "permitted": caps},
		},
		"root":     object{"path": c.rootfs, "readonly": true},
		"hostname": c.hostname,
		"mounts": append([]mount{
			{"/proc", "proc", "proc", nil},
			{"/dev", "tmpfs", "tmpfs", []string{"nosuid", "mode=755"}},
			{"/tmp", "tmpfs", "tmpfs", nil},
		}, c.mounts...),
		"annotations": annotations,
		"hooks":       hooks,
		"linux": object{
			"cgroupsPath": "/" + filepath.Base(r.h.Dir) + "/" + c.name,
			"namespaces":  []object{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, network},
		},
	}
}

// run makes a container and starts it.
func (r *rig) run(c container) {
	r.Helper()
	if err := r.tryRun(c); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) tryRun(c container) error {
	r.Helper()
	r.bundle(c)
	return r.start(c.name)
}

// start makes a container of a bundle that is there. What the runtime prints is kept in a file: the container keeps that open.
func (r *rig) start(name string) error {
	r.made = append(r.made, name)
	const script = `exec "$@" >>"$log" 2>&1 </dev/null`
	args := append([]string{"-c", "log=" + r.log(name) + "; " + script, "sh"}, r.command("run", "--detach", "--bundle", r.dir(name), name)...)
	_, err := r.h.Run(r.Context(), "sh", args...)
	if err != nil {
		text, _ := os.ReadFile(r.log(name))
		return fmt.Errorf("%w: %s", err, text)
	}
	return nil
}

// command is a command line of the runtime.
func (r *rig) command(args ...string) []string {
	return append([]string{r.runtime, "--root", "/run/test-" + r.runtime}, args...)
}

func (r *rig) try(args ...string) (string, error) {
	c := r.command(args...)
	return r.h.Run(r.background(), c[0], c[1:]...)
}

// in runs a program in a container, which must print want.
func (r *rig) in(name, want string, args ...string) {
	r.Helper()
	out, err := r.try(append([]string{"exec", name}, args...)...)
	if err != nil || !strings.Contains(out, want) {
		r.Errorf("%s in %s: printed %q, %v; want %q", strings.Join(args, " "), name, out, err, want)
	}
}

// state is what the runtime says of a container, as a hook is told.
func (r *rig) state(name string) map[string]any {
	r.Helper()
	text, err := r.try("state", name)
	if err != nil {
		r.Fatal(err)
	}
	var s map[string]any
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		r.Fatalf("state of %s: %v: %s", name, err, text)
	}
	return s
}

func (r *rig) pid(name string) int { return int(r.state(name)["pid"].(float64)) }

// end kills and deletes containers.
func (r *rig) end(names ...string) {
	r.Helper()
	for _, name := range slices.Clone(names) {
		if _, err := r.try("delete", "--force", name); err != nil {
			r.Errorf("delete %s: %v", name, err)
		}
		r.made = slices.DeleteFunc(slices.Clone(r.made), func(m string) bool { return m == name })
	}
}

// hook runs a hook by hand on a state.
func (r *rig) hook(state map[string]any, args ...string) error {
	r.Helper()
	text, err := json.Marshal(state)
	if err != nil {
		r.Fatal(err)
	}
	if args == nil {
		args = []string{r.usernetBin(), "oci-hook"}
	}
	return r.h.Feed(r.Context(), string(text), args[0], args[1:]...)
}

// stopped is a container's state as a poststop hook is told.
func stopped(state map[string]any) map[string]any {
	s := maps.Clone(state)
	s["status"] = "stopped"
	delete(s, "pid")
	return s
}

func (r *rig) ps() []engine.PSNetwork {
	r.Helper()
	return r.h.PS(r)
}

// endpoint finds a container's endpoint.
func (r *rig) endpoint(name string) (engine.PSNetwork, engine.PSEndpoint) {
	r.Helper()
	for _, n := range r.ps() {
		for _, e := range n.Endpoints {
			if e.ContainerID == name {
				return n, e
			}
		}
	}
	r.Fatalf("usernet ps does not list %s", name)
	panic("unreachable")
}

// addr is a container's IPv4 address.
func (r *rig) addr(name string) string {
	r.Helper()
	_, e := r.endpoint(name)
	return e.IPv4.Addr().String()
}

// publishes checks which ports usernet ps lists for a container, as HOST->CONTAINER.
func (r *rig) publishes(name string, want ...string) {
	r.Helper()
	_, e := r.endpoint(name)
	var got []string
	for _, p := range e.Ports {
		got = append(got, fmt.Sprintf("%d->%d/%s", p.HostPort, p.ContainerPort, p.Proto))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		r.Errorf("usernet ps: %s publishes %v, want %v", name, got, want)
	}
}

// look waits for a program in a container that runs: it may take as long until it listens.
var look = engine.Look{Patience: 5 * time.Second}

// page fetches a page; it must contain all of want.
func (r *rig) page(from *netns.NS, addr string, want ...string) {
	r.Helper()
	look.Page(r, from, addr, want...)
}

func (r *rig) noPage(from *netns.NS, addr string) {
	r.Helper()
	engine.Look{Attempt: time.Second}.NoPage(r, from, addr)
}

// wait asks until it is told that all is well; after the time it fails with the last error.
func (r *rig) wait(limit time.Duration, what string, check func() error) {
	r.Helper()
	engine.Wait(r, limit, what, check)
}

// snapshot is how the host looks.
func (r *rig) snapshot() engine.Snapshot { return r.h.Looks(r) }

// background is for what must be done after the test's own context ended.
func (r *rig) background() context.Context { return context.WithoutCancel(r.Context()) }
