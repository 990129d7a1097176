package podman_test

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
)

// Addresses as they stand in URLs and -p arguments.
var (
	hostIP   = engine.HostAddr.Addr().String()
	hostIP2  = engine.HostAddr2.Addr().String()
	hostIP6  = engine.HostAddr6.Addr().String()
	router   = engine.RouterAddr.Addr().String()
	router6  = engine.Router6.Addr().String()
	far      = engine.FarAddr.String()
	far6     = engine.FarAddr6.String()
	localAll = []string{"127.0.0.1", "[::1]", hostIP, "[" + hostIP6 + "]"}
)

// rig is what a case has in hand: an engine, the kind of network to make, and ways to do something and fail when that
// does not work.
type rig struct {
	*testing.T
	e    *engine.Podman
	mode mode
}

// podman runs podman and returns what it printed.
func (r *rig) podman(args ...string) string {
	r.Helper()
	return r.e.CLI().Must(r, args...)
}

// refused runs podman, which must refuse with a message that has all of parts in it.
func (r *rig) refused(parts []string, args ...string) {
	r.Helper()
	r.e.CLI().Refused(r, parts, args...)
}

// network makes a network of the case's mode. A short name of letters up to f may be the beginning of another one's ID,
// and then Podman finds that it is there already.
func (r *rig) network(name string, args ...string) string {
	r.Helper()
	return r.podman(append(append([]string{"network", "create"}, r.mode.args...), append(args, name)...)...)
}

// run starts a container that serves on port 80, unless the arguments say something else after the image.
func (r *rig) run(name string, args ...string) {
	r.Helper()
	r.e.CLI().Start(r, name, []string{"--cap-add", "NET_RAW"}, args)
}

// in runs a program in a container.
func (r *rig) in(container string, args ...string) (string, error) {
	return r.e.CLI().In(r.Context(), container, args...)
}

// works runs a program in a container; it must succeed and print want.
func (r *rig) works(want, container string, args ...string) {
	r.Helper()
	r.e.CLI().Works(r, want, container, args...)
}

// fails runs a program in a container, which must run, soon give up and end with status 1.
func (r *rig) fails(container string, args ...string) {
	r.Helper()
	r.e.CLI().Fails(r, container, args...)
}

// look waits for a program in a container that podman says is running: it may take as long until it listens. Where usernet is not in the way,
// whoever holds the port for the container accepts and says nothing.
var look = engine.Look{Patience: 4 * time.Second, Attempt: 2 * time.Second}

// page fetches a page from a namespace; it must contain all of want.
func (r *rig) page(from *netns.NS, addr string, want ...string) {
	r.Helper()
	look.Page(r, from, addr, want...)
}

func (r *rig) fetch(from *netns.NS, addr string, want ...string) error {
	return look.Fetch(r.Context(), from, addr, want...)
}

// noPage checks that nobody serves a page there.
func (r *rig) noPage(from *netns.NS, addr string) {
	r.Helper()
	look.NoPage(r, from, addr)
}

// udp asks a UDP server from a namespace; the answer must contain want.
func (r *rig) udp(from *netns.NS, addr, want string) {
	r.Helper()
	look.UDP(r, from, addr, want)
}

func (r *rig) host() *netns.NS    { return r.e.NS() }
func (r *rig) outside() *netns.NS { return r.e.Outside().NS() }

// inspect reads a value of a container by a Go template.
func (r *rig) inspect(name, format string) string {
	r.Helper()
	return r.e.CLI().Inspect(r, name, format)
}

// addr is a container's IPv4 address on a network.
func (r *rig) addr(container, network string) netip.Addr {
	r.Helper()
	return r.e.CLI().Addr(r, container, network)
}

// ps is what usernet ps --json says.
func (r *rig) ps() []engine.PSNetwork {
	r.Helper()
	return r.e.PS(r)
}

// endpoint is what usernet says of a container on a network.
func (r *rig) endpoint(container, network string) engine.PSEndpoint {
	r.Helper()
	for _, n := range r.ps() {
		for _, e := range n.Endpoints {
			if n.Name == network && e.Container == container {
				return e
			}
		}
	}
	r.Fatalf("usernet ps does not list %s on %s", container, network)
	panic("unreachable")
}

// publishes checks that usernet ps lists just these published ports of a container, in the form HOST->CONTAINER/PROTO.
func (r *rig) publishes(container, network string, want ...string) {
	r.Helper()
	if r.mode.name == own.name {
		return
	}
	r.endpoint(container, network).Publishes(r, container, want...)
}

// wait asks until it is told that all is well; after the time it fails with the last error.
func (r *rig) wait(limit time.Duration, what string, check func() error) {
	r.Helper()
	engine.Wait(r, limit, what, check)
}

// snapshot is how the host looks.
func (r *rig) snapshot() engine.Snapshot { return r.e.Looks(r) }

// background is for what must be done after the test's own context ended.
func (r *rig) background() context.Context { return context.WithoutCancel(r.Context()) }

// clean removes every container, pod and network that a test can make. A test that failed may have left the daemon dead.
func (r *rig) clean() {
	if r.mode.name != own.name && !r.e.UsernetRunning() {
		r.stopAnyStarted()
		if err := r.e.StartUsernet(r.background()); err != nil {
			r.Errorf("clean up: %v", err)
		}
	}
	for _, args := range [][]string{{"pod", "rm", "-f", "-a", "-t", "0"}, {"rm", "-f", "-a", "-t", "0"}} {
		if _, err := r.e.Podman(r.background(), args...); err != nil {
			r.Errorf("clean up: %v", err)
		}
	}
	names, err := r.e.Podman(r.background(), "network", "ls", "--format", "{{.Name}}")
	for _, name := range strings.Fields(names) {
		if name == "podman" {
			continue
		}
		_, rmErr := r.e.Podman(r.background(), "network", "rm", "-f", name)
		err = errors.Join(err, rmErr)
	}
	if err != nil {
		r.Errorf("clean up: %v", err)
	}
}
