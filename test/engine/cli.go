package engine

import (
	"context"
	"errors"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// CLI is the command of a container engine, docker or podman.
type CLI struct {
	name string
	run  func(ctx context.Context, args ...string) (string, error)
}

// CLI is docker.
func (e *Engine) CLI() CLI { return CLI{"docker", e.Docker} }

// CLI is podman.
func (p *Podman) CLI() CLI { return CLI{"podman", p.Podman} }

// Must runs the command and returns what it printed.
func (c CLI) Must(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.run(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Refused runs the command, which must refuse with a message that has all of parts in it.
func (c CLI) Refused(t testing.TB, parts []string, args ...string) {
	t.Helper()
	out, err := c.run(t.Context(), args...)
	if err == nil {
		t.Errorf("%s %s: worked: %s", c.name, strings.Join(args, " "), out)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q misses %q", err, part)
		}
	}
}

// Start starts a container that serves on port 80, unless args says something else after the image. flags go before them.
func (c CLI) Start(t testing.TB, name string, flags, args []string) {
	t.Helper()
	if !slices.Contains(args, Image) {
		args = append(args, Image)
	}
	c.Must(t, slices.Concat([]string{"run", "-d"}, flags, []string{"--name", name, "--hostname", name}, args)...)
}

// In runs a program in a container.
func (c CLI) In(ctx context.Context, container string, args ...string) (string, error) {
	return c.run(ctx, append([]string{"exec", container}, args...)...)
}

// Works runs a program in a container; it must succeed and print want.
func (c CLI) Works(t testing.TB, want, container string, args ...string) {
	t.Helper()
	out, err := c.In(t.Context(), container, args...)
	if err != nil || !strings.Contains(out, want) {
		t.Errorf("%s in %s: printed %q, %v; want %q", strings.Join(args, " "), container, out, err, want)
	}
}

// Fails runs a program in a container, which must run, soon give up and end with status 1.
func (c CLI) Fails(t testing.TB, container string, args ...string) {
	t.Helper()
	out, err := c.run(t.Context(), append([]string{"exec", "-e", "PROBE_PATIENCE=1s", container}, args...)...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || strings.Contains(err.Error(), "Error response") {
		t.Errorf("%s in %s: printed %q, %v; want a failure", strings.Join(args, " "), container, out, err)
	}
}

// Inspect reads a value of a container by a Go template.
func (c CLI) Inspect(t testing.TB, name, format string) string {
	t.Helper()
	return c.Must(t, "inspect", "-f", "{{"+format+"}}", name)
}

// Addr is a container's IPv4 address on a network.
func (c CLI) Addr(t testing.TB, container, network string) netip.Addr {
	t.Helper()
	a, err := netip.ParseAddr(c.Inspect(t, container, "(index .NetworkSettings.Networks \""+network+"\").IPAddress"))
	if err != nil {
		t.Fatal(err)
	}
	return a
}
