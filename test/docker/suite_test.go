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
	"testing"

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
	name   string
	modes  []mode
	run    func(r *rig)
	engine string // the only one to run it on; "" is all
}

var both = []mode{usermode, bridge}

var cases = []testCase{
	{name: "web", modes: both, run: web},
	{name: "egress", modes: both, run: egress},
	{name: "internal", modes: both, run: internal},
	{name: "ipv6", modes: both, run: ipv6},
	{name: "ports", modes: both, run: ports},
	{name: "portRange", modes: both, run: portRange},
	{name: "ephemeral", modes: both, run: ephemeral},
	{name: "conflict", modes: both, run: conflict},
	{name: "release", modes: both, run: release},
	{name: "portCommand", modes: both, run: portCommand},
	{name: "severalNetworks", modes: both, run: severalNetworks},
	{name: "isolation", modes: both, run: isolation},
	{name: "chosenAddresses", modes: both, run: chosenAddresses},
	{name: "nullIPAM", modes: both, run: nullIPAM},
	{name: "mtu", modes: both, run: mtu},
	{name: "icc", modes: both, run: icc},
	{name: "namesAndBinding", modes: both, run: namesAndBinding},
	{name: "hostLoopback", modes: both, run: hostLoopback},
	{name: "hostUntouched", modes: []mode{usermode}, run: hostUntouched},
	{name: "masquerade", modes: []mode{bridge}, run: masquerade},
	{name: "adoptedBridge", modes: []mode{bridge}, run: adoptedBridge},
	{name: "flushedFirewall", modes: []mode{bridge}, run: flushedFirewall},
	{name: "badInput", modes: both, run: badInput},
	{name: "hostileCalls", modes: []mode{usermode}, run: hostileCalls},
	{name: "compose", modes: both, run: compose},
	{name: "usernetKilled", modes: both, run: usernetKilled},
	{name: "usernetKilledAnytime", modes: both, run: usernetKilledAnytime},
	{name: "usernetAbsent", modes: []mode{usermode}, run: usernetAbsent},
	{name: "engineRestarted", modes: both, run: engineRestarted},
	{name: "engineKilled", modes: both, run: engineKilled},
	{name: "liveRestore", modes: both, run: liveRestore},
	{name: "many", modes: both, run: many, engine: engine.Docker28().Name},
}

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

func TestDocker(t *testing.T) { engine.Each(t, suite) }

func suite(t *testing.T, e *engine.Engine) {
	if os.Getenv("USERNET_TEST_MODES") != own.name {
		if err := e.StartUsernet(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range cases {
		if c.engine != "" && c.engine != e.Kind.Name {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			modes := c.modes
			if os.Getenv("USERNET_TEST_MODES") == own.name {
				modes = []mode{own}
			}
			for _, m := range modes {
				if !engine.Chosen("USERNET_TEST_MODES", m.name) {
					continue
				}
				t.Run(m.name, func(t *testing.T) { run(t, e, m, c) })
			}
		})
	}
}

// run runs one case.
func run(t *testing.T, e *engine.Engine, m mode, c testCase) {
	r := &rig{T: t, e: e, mode: m}
	e.Restored(t, r.clean, func() { c.run(r) })
}
