// Package docker_test runs containers on usernet networks with real Docker engines, and looks at what users see: pages
// fetched through published ports, names, addresses, error messages, and what is left behind.
//
//	go test ./test/docker -run 'TestDocker/docker28/ports/usermode' -v
//
// USERNET_TEST_ENGINES and USERNET_TEST_MODES, lists separated by commas, choose what to run with. The mode "own" is
// not usernet but Docker's own bridge driver: it tests the tests.
package docker_test

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// mode is a kind of network, and how to ask Docker for it.
type mode struct {
	name string
	args []string
}

var (
	usermode = mode{"usermode", []string{"-d", "usernet"}}
	bridge   = mode{"bridge", []string{"-d", "usernet", "-o", "mode=bridge"}}
	own      = mode{"own", []string{"-d", "bridge"}}
)

// testCase is a test on one network mode and one engine. It finds the engine without containers and networks, and all
// that it makes there is removed after it; then the host must look as it did before.
type testCase struct {
	name  string
	modes []mode
	run   func(r *rig)
}

var both = []mode{usermode, bridge}

var cases = []testCase{
	{"web", both, web},
	{"egress", both, egress},
	{"internal", both, internal},
	{"ipv6", both, ipv6},
	{"ports", both, ports},
	{"portRange", both, portRange},
	{"ephemeral", both, ephemeral},
	{"conflict", both, conflict},
	{"release", both, release},
	{"portCommand", both, portCommand},
	{"severalNetworks", both, severalNetworks},
	{"isolation", both, isolation},
	{"chosenAddresses", both, chosenAddresses},
	{"nullIPAM", both, nullIPAM},
	{"mtu", both, mtu},
	{"icc", both, icc},
	{"namesAndBinding", both, namesAndBinding},
	{"hostLoopback", both, hostLoopback},
	{"hostUntouched", []mode{usermode}, hostUntouched},
	{"masquerade", []mode{bridge}, masquerade},
	{"adoptedBridge", []mode{bridge}, adoptedBridge},
	{"flushedFirewall", []mode{bridge}, flushedFirewall},
	{"badInput", both, badInput},
	{"hostileCalls", []mode{usermode}, hostileCalls},
	{"compose", both, compose},
	{"usernetKilled", both, usernetKilled},
	{"usernetKilledAnytime", both, usernetKilledAnytime},
	{"usernetAbsent", both, usernetAbsent},
	{"engineRestarted", both, engineRestarted},
	{"engineKilled", both, engineKilled},
	{"liveRestore", both, liveRestore},
	{"many", both, many},
}

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

func TestDocker(t *testing.T) {
	for _, kind := range []engine.Kind{engine.Docker20(), engine.Docker28()} {
		t.Run(kind.Name, func(t *testing.T) {
			if !chosen("USERNET_TEST_ENGINES", kind.Name) {
				t.Skip("not in USERNET_TEST_ENGINES")
			}
			t.Parallel()
			suite(t, kind)
		})
	}
}

func suite(t *testing.T, kind engine.Kind) {
	if err := kind.Missing(); err != nil {
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	start := time.Now()
	e, err := engine.New(t.Context(), kind)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	if os.Getenv("USERNET_TEST_MODES") != own.name {
		if err := e.StartUsernet(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("engine ready after %v", time.Since(start).Round(time.Millisecond))
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			modes := c.modes
			if os.Getenv("USERNET_TEST_MODES") == own.name {
				modes = []mode{own}
			}
			for _, m := range modes {
				if !chosen("USERNET_TEST_MODES", m.name) {
					continue
				}
				t.Run(m.name, func(t *testing.T) { run(t, e, m, c) })
			}
		})
	}
}

func chosen(variable, name string) bool {
	v := os.Getenv(variable)
	return v == "" || slices.Contains(strings.Split(v, ","), name)
}

// run runs one case: the state of the host before, the case, and the state after everything was removed.
func run(t *testing.T, e *engine.Engine, m mode, c testCase) {
	r := &rig{T: t, e: e, mode: m, logs: e.LogSizes()}
	before := r.snapshot()
	defer func() {
		r.clean()
		r.wait(10*time.Second, "the host to look as before", func() error {
			return same(before, r.snapshot())
		})
		if t.Failed() {
			t.Logf("logs since the test began:\n%s", e.LogsSince(r.logs))
		}
	}()
	c.run(r)
}
