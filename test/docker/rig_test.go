package docker_test

import (
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
	e    *engine.Engine
	mode mode
}

// docker runs docker and returns what it printed.
func (r *rig) docker(args ...string) string {
	r.Helper()
	return r.e.CLI().Must(r, args...)
}

// refused runs docker, which must refuse with a message that has all of parts in it.
func (r *rig) refused(parts []string, args ...string) {
	r.Helper()
	r.e.CLI().Refused(r, parts, args...)
}

// network makes a network of the case's mode.
func (r *rig) network(name string, args ...string) string {
	r.Helper()
	return r.docker(append(append([]string{"network", "create"}, r.mode.args...), append(args, name)...)...)
}

// run starts a container that serves on port 80, unless the arguments say something else after the image.
func (r *rig) run(name string, args ...string) {
	r.Helper()
	r.e.CLI().Start(r, name, nil, args)
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

// look waits for a program in a container that docker says is running: it may take as long until it listens.
var look = engine.Look{Patience: 3 * time.Second}

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
	return r.e.PS(r, "--control-socket", engine.ControlSocket)
}

// endpoint is what usernet says of a container on a network, by the endpoint's ID.
func (r *rig) endpoint(container, network string) engine.PSEndpoint {
	r.Helper()
	id := r.inspect(container, "(index .NetworkSettings.Networks \""+network+"\").EndpointID")
	for _, n := range r.ps() {
		for _, e := range n.Endpoints {
			if e.ID == id {
				return e
			}
		}
	}
	r.Fatalf("usernet ps does not list endpoint %s of %s", id, container)
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

// clean removes every container and every network that a test can make. A test that failed may have left a daemon
// dead.
func (r *rig) clean() {
	if err := r.e.Revive(r.background()); err != nil {
		r.Errorf("clean up: %v", err)
	}
	for _, kind := range []struct{ list, remove []string }{
		{[]string{"ps", "-aq"}, []string{"rm", "-f"}},
		{[]string{"network", "ls", "-q", "-f", "type=custom"}, []string{"network", "rm"}},
	} {
		ids, err := r.e.Docker(r.background(), kind.list...)
		if err == nil && ids != "" {
			_, err = r.e.Docker(r.background(), append(kind.remove, strings.Fields(ids)...)...)
		}
		if err != nil {
			r.Errorf("clean up: %v", err)
		}
	}
}
