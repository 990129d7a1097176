package oci_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
)

// Podman runs hooks of its own accord, from files, for containers with an annotation.
func TestPodman(t *testing.T) {
	engine.EachPodman(t, func(t *testing.T, p *engine.Podman) { podmanSuite(t, p, both) })
}

// TestRootlessPodman does the same as an ordinary user, whose networks are of mode usermode.
func TestRootlessPodman(t *testing.T) {
	engine.EachRootless(t, func(t *testing.T, p *engine.Podman) { podmanSuite(t, p, either) })
}

// podmanRig is a Podman with dist/hooks.d in its place.
type podmanRig struct {
	*testing.T
	p *engine.Podman
}

func podmanSuite(t *testing.T, p *engine.Podman, modes []string) {
	text, err := os.ReadFile("../../dist/hooks.d/usernet.json")
	if err != nil {
		t.Fatal(err)
	}
	dir := p.Path("/usr/share/containers/oci/hooks.d")
	here := strings.ReplaceAll(string(text), "/usr/bin/usernet", filepath.Join(p.Dir, "bin/usernet"))
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "usernet.json"), []byte(here), 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := p.StartUsernet(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) { (&podmanRig{t, p}).containers(mode) })
	}
	t.Run("selfStart", func(t *testing.T) { (&podmanRig{t, p}).selfStart() })
}

// selfStart: there is no daemon, and the hook starts one, which outlives it. It ends with the pretend host.
func (r *podmanRig) selfStart() {
	if err := r.p.StopUsernet(); err != nil {
		r.Fatal(err)
	}
	r.run("www", "--annotation", "usernet.network=web", "--annotation", "usernet.publish=8080:80")
	r.page(r.p.Outside().NS(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.podman("rm", "-f", "-t", "0", "www")
	(&rig{T: r.T}).noPage(r.p.NS(), "127.0.0.1:8080")
}

// podman runs podman and returns what it printed.
func (r *podmanRig) podman(args ...string) string {
	r.Helper()
	out, err := r.p.Podman(context.WithoutCancel(r.Context()), args...)
	if err != nil {
		r.Fatal(err)
	}
	return out
}

func (r *podmanRig) run(name string, args ...string) {
	r.Helper()
	r.podman(append(append([]string{"run", "-d", "--name", name, "--hostname", name, "--network", "none", "--cap-add", "NET_RAW"}, args...), engine.Image)...)
	r.Cleanup(func() { r.p.Podman(context.WithoutCancel(r.Context()), "rm", "-f", "-t", "0", name) })
}

// ps is usernet ps --json.
func (r *podmanRig) ps() []engine.PSNetwork {
	r.Helper()
	return r.p.PS(r)
}

func (r *podmanRig) works(want, name string, args ...string) {
	r.Helper()
	r.p.CLI().Works(r, want, name, args...)
}

func (r *podmanRig) page(from *netns.NS, addr string, want ...string) {
	r.Helper()
	rr := &rig{T: r.T}
	rr.page(from, addr, want...)
}

func (r *podmanRig) containers(mode string) {
	web := []string{"--annotation", "usernet.network=web", "--annotation", "usernet.mode=" + mode}
	r.run("www", append(web, "--annotation", "usernet.publish=8080:80")...)
	r.run("other", append(web, "-v", r.p.Dir+"/resolv.conf:/etc/resolv.conf")...)
	r.page(r.p.NS(), "127.0.0.1:8080", "hello from www")
	r.page(r.p.Outside().NS(), hostIP+":8080", "hello from www", "peer "+router+":")
	r.works("peer "+hostIP+":", "www", "probe", "fetch", "http://"+far+"/")
	r.works("1 packets received", "www", "ping", "-c", "1", "-W", "2", "other")
	r.works(far, "www", "probe", "resolve", engine.FarName)
	r.works("nameserver "+engine.DNSAddr.String(), "other", "cat", "/etc/resolv.conf") // the user's choice

	// Of containers without the annotation the hook hears nothing.
	r.run("alone")
	out, err := r.p.Podman(r.Context(), "exec", "alone", "ip", "link")
	if err != nil || strings.Contains(out, "eth0") {
		r.Errorf("a container without the annotation has %s, %v", out, err)
	}
	r.podman("restart", "-t", "0", "www")
	r.page(r.p.NS(), "127.0.0.1:8080", "hello from www")
	// With the daemon dead at their end, containers still go.
	if err := r.p.KillUsernet(); err != nil {
		r.Fatal(err)
	}
	if err := r.p.StartUsernet(r.Context()); err != nil {
		r.Fatal(err)
	}
	r.page(r.p.NS(), "127.0.0.1:8080", "hello from www")
	r.podman("stop", "-t", "0", "www")
	rr := &rig{T: r.T}
	rr.noPage(r.p.NS(), "127.0.0.1:8080")
	r.podman("rm", "-f", "-t", "0", "www", "other", "alone")
	rr.wait(5*time.Second, "the network to go", func() error {
		if list := r.ps(); len(list) > 0 {
			return fmt.Errorf("there is %+v", list)
		}
		return nil
	})
}
