package podman_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
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

// The parts of usernet ps --json that tests look at, written down here again: scripts of users rely on them.
type (
	psNetwork struct {
		ID        string
		Name      string
		Mode      string
		Up        bool
		Endpoints []psEndpoint
	}
	psEndpoint struct {
		ID         string
		Container  string
		IPv4, IPv6 netip.Prefix
		MAC        string
		Ports      []psPort
	}
	psPort struct {
		Proto         string
		HostIP        netip.Addr `json:"host_ip"`
		HostPort      uint16     `json:"host_port"`
		ContainerPort uint16     `json:"container_port"`
		Error         string
	}
)

// rig is what a case has in hand: an engine, the kind of network to make, and ways to do something and fail when that
// does not work.
type rig struct {
	*testing.T
	e    *engine.Podman
	mode mode
	logs map[string]int64
}

// podman runs podman and returns what it printed.
func (r *rig) podman(args ...string) string {
	r.Helper()
	out, err := r.e.Podman(r.Context(), args...)
	if err != nil {
		r.Fatal(err)
	}
	return out
}

// refused runs podman, which must refuse with a message that has all of parts in it.
func (r *rig) refused(parts []string, args ...string) {
	r.Helper()
	out, err := r.e.Podman(r.Context(), args...)
	if err == nil {
		r.Errorf("podman %s: worked: %s", strings.Join(args, " "), out)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			r.Errorf("error %q misses %q", err, part)
		}
	}
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
	if len(args) == 0 || !hasImage(args) {
		args = append(args, engine.Image)
	}
	r.podman(append([]string{"run", "-d", "--cap-add", "NET_RAW", "--name", name, "--hostname", name}, args...)...)
}

func hasImage(args []string) bool {
	for _, a := range args {
		if a == engine.Image {
			return true
		}
	}
	return false
}

// in runs a program in a container.
func (r *rig) in(container string, args ...string) (string, error) {
	return r.e.Podman(r.Context(), append([]string{"exec", container}, args...)...)
}

// works runs a program in a container; it must succeed and print want.
func (r *rig) works(want, container string, args ...string) {
	r.Helper()
	out, err := r.in(container, args...)
	if err != nil || !strings.Contains(out, want) {
		r.Errorf("%s in %s: printed %q, %v; want %q", strings.Join(args, " "), container, out, err, want)
	}
}

// fails runs a program in a container, which must run, soon give up and end with status 1.
func (r *rig) fails(container string, args ...string) {
	r.Helper()
	short := append([]string{"exec", "-e", "PROBE_PATIENCE=1s", container}, args...)
	out, err := r.e.Podman(r.Context(), short...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || strings.Contains(err.Error(), "Error response") {
		r.Errorf("%s in %s: printed %q, %v; want a failure", strings.Join(args, " "), container, out, err)
	}
}

// serving is how long the program in a container that podman says is running may take until it listens.
const serving = 2 * time.Second

// page fetches a page from a namespace; it must contain all of want.
func (r *rig) page(from *netns.NS, addr string, want ...string) {
	r.Helper()
	r.wait(2*serving, "the page", func() error { return r.fetch(from, addr, want...) })
}

func (r *rig) fetch(from *netns.NS, addr string, want ...string) error {
	// Where usernet is not in the way, whoever holds the port for the container accepts and says nothing.
	ctx, cancel := context.WithTimeout(r.Context(), serving)
	defer cancel()
	text, err := engine.Get(ctx, from, addr)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", addr, err)
	}
	for _, w := range want {
		if !strings.Contains(text, w) {
			return fmt.Errorf("fetch %s: got %q, want %q", addr, text, w)
		}
	}
	return nil
}

// noPage checks that nobody serves a page there.
func (r *rig) noPage(from *netns.NS, addr string) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), serving)
	defer cancel()
	if text, err := engine.Get(ctx, from, addr); err == nil {
		r.Errorf("fetch %s: worked: %q", addr, text)
	}
}

// udp asks a UDP server from a namespace; the answer must contain want.
func (r *rig) udp(from *netns.NS, addr, want string) {
	r.Helper()
	r.wait(2*serving, "an answer by UDP", func() error {
		text, err := engine.AskUDP(r.Context(), from, addr, "knock")
		if err != nil || !strings.Contains(text, want) || !strings.HasSuffix(text, " knock") {
			return fmt.Errorf("udp %s: got %q, %v; want %q", addr, text, err, want)
		}
		return nil
	})
}

func (r *rig) host() *netns.NS    { return r.e.NS() }
func (r *rig) outside() *netns.NS { return r.e.Outside().NS() }

// inspect reads a value of a container by a Go template.
func (r *rig) inspect(name, format string) string {
	r.Helper()
	return r.podman("inspect", "-f", "{{"+format+"}}", name)
}

// addr is a container's IPv4 address on a network.
func (r *rig) addr(container, network string) netip.Addr {
	r.Helper()
	a, err := netip.ParseAddr(r.inspect(container, "(index .NetworkSettings.Networks \""+network+"\").IPAddress"))
	if err != nil {
		r.Fatal(err)
	}
	return a
}

// ps is what usernet ps --json says.
func (r *rig) ps() []psNetwork {
	r.Helper()
	text, err := r.e.Usernet(r.Context(), "ps", "--json")
	if err != nil {
		r.Fatal(err)
	}
	var list []psNetwork
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		r.Fatalf("usernet ps --json: %v: %s", err, text)
	}
	return list
}

// endpoint is what usernet says of a container on a network.
func (r *rig) endpoint(container, network string) psEndpoint {
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
	got := map[string]int{}
	for _, p := range r.endpoint(container, network).Ports {
		s := fmt.Sprintf("%d->%d/%s", p.HostPort, p.ContainerPort, p.Proto)
		if p.HostIP.IsValid() {
			s = p.HostIP.String() + " " + s
		}
		if p.Error != "" {
			s += " " + p.Error
		}
		got[s]++
	}
	wanted := map[string]int{}
	for _, w := range want {
		wanted[w]++
	}
	if fmt.Sprint(got) != fmt.Sprint(wanted) {
		r.Errorf("usernet ps: %s publishes %v, want %v", container, got, wanted)
	}
}

// wait asks until it is told that all is well; after the time it fails with the last error.
func (r *rig) wait(limit time.Duration, what string, check func() error) {
	r.Helper()
	engine.Wait(r, limit, what, check)
}

func (r *rig) snapshot() engine.Snapshot {
	s, err := r.e.Snapshot(r.background())
	if err != nil {
		r.Errorf("snapshot: %v", err)
	}
	return s
}

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
