// Package podman_test runs containers on usernet networks with real Podmans, and looks at what users see: pages fetched through
// published ports, addresses, routes, error messages, and what is left behind.
//
//	go test ./test/podman -run 'TestPodman/podman58/ports/usermode' -v
//
// USERNET_TEST_ENGINES and USERNET_TEST_MODES, lists separated by commas, choose what to run with. The mode "own" is
// not usernet but netavark's bridge driver: it tests the tests.
package podman_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// mode is a kind of network, and how to ask Podman for it.
type mode struct {
	name string
	args []string
}

var (
	usermode = mode{"usermode", []string{"--driver", "usernet"}}
	bridge   = mode{"bridge", []string{"--driver", "usernet", "-o", "mode=bridge"}}
	own      = mode{"own", []string{"--driver", "bridge"}}
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
	{name: "hostUntouched", modes: []mode{usermode}, run: hostUntouched},
	{name: "isolation", modes: both, run: isolation},
	{name: "ports", modes: both, run: ports},
	{name: "unreserved", modes: both, run: unreserved},
	{name: "manyPorts", modes: both, run: manyPorts},
	{name: "publishOption", modes: both, run: publishOption},
	{name: "bindingOption", modes: both, run: bindingOption},
	{name: "flushed", modes: both, run: flushed},
	{name: "severalNetworks", modes: both, run: severalNetworks},
	{name: "mixed", modes: both, run: mixed},
	{name: "pod", modes: both, run: pod},
	{name: "names", modes: both, run: names},
	{name: "namesAcrossNetworks", modes: both, run: namesAcrossNetworks},
	{name: "nameServers", modes: both, run: nameServers},
	{name: "reload", modes: both, run: reload},
	{name: "chosenAddresses", modes: both, run: chosenAddresses},
	{name: "options", modes: both, run: options},
	{name: "badInput", modes: both, run: badInput},
	{name: "quadlet", modes: both, run: quadlet},
	{name: "latency", modes: both, run: latency},
	{name: "api", modes: both, run: api},
	{name: "usernetKilled", modes: both, run: usernetKilled},
	{name: "killedAnytime", modes: both, run: killedAnytime},
	{name: "vanished", modes: both, run: vanished},
	{name: "selfStart", modes: []mode{usermode}, run: selfStart},
	{name: "daemonRefuses", modes: []mode{usermode}, run: daemonRefuses},
	{name: "many", modes: []mode{usermode}, run: many},
}

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

func TestPodman(t *testing.T) {
	engine.EachPodman(t, func(t *testing.T, e *engine.Podman) { suite(t, e, cases) })
}

func suite(t *testing.T, e *engine.Podman, cases []testCase) {
	if os.Getenv("USERNET_TEST_MODES") != own.name {
		if err := e.StartUsernet(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	warmUp(t, e)
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

// warmUp uses netavark once: it leaves chains behind. Then it waits for those who clean up after the container.
func warmUp(t *testing.T, e *engine.Podman) {
	if _, err := e.Podman(t.Context(), "run", "--rm", "-p", "8080:80", engine.Image, "true"); err != nil {
		t.Fatal(err)
	}
	engine.Wait(t, 10*time.Second, "Podman to clean up", func() error {
		for _, name := range e.Looks(t)["processes"] {
			if name == "conmon" || name == "podman" {
				return errors.New(name)
			}
		}
		return nil
	})
}

// run runs one case.
func run(t *testing.T, e *engine.Podman, m mode, c testCase) {
	r := &rig{T: t, e: e, mode: m}
	e.Restored(t, r.clean, func() { c.run(r) })
}
