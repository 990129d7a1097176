// Package cni_test gives containers usernet networks by CNI: by plain calls of the plugin, by cnitool, containerd and Podman 4.3, alone
// and in chains with the official plugins.
//
//	go test ./test/cni -run 'TestCNI/crash' -v
//	CNI_ROUNDS=50 go test ./test/cni -run TestCNI/times -v
package cni_test

import (
	"os"
	"testing"

	"github.com/usernet/usernet/test/engine"
)

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

// testCase is a test. It finds the host without containers and networks, and must leave it like that.
type testCase struct {
	name string
	run  func(r *rig)
}

var cases = []testCase{
	{"tool", tool},
	{"addresses", addresses},
	{"examples", examples},
	{"dhcp", dhcp},
	{"several", several},
	{"after", after},
	{"before", before},
	{"bandwidth", bandwidth},
	{"containerd", containerd},
	{"podman", podman},
	{"many", many},
	{"rounds", rounds},
	{"crash", crash},
	{"selfStart", selfStart},
	{"times", times},
}

func TestCNI(t *testing.T) {
	engine.WithCNI(t, func(t *testing.T, c *engine.CNI) {
		if err := c.StartUsernet(t.Context()); err != nil {
			t.Fatal(err)
		}
		warmUp(t, c)
		for _, tc := range cases {
			t.Run(tc.name, func(t *testing.T) { run(t, c, tc) })
		}
	})
}

// warmUp uses the official plugins and Podman once: they leave chains, bridges and directories behind.
func warmUp(t *testing.T, e *engine.CNI) {
	r := &rig{T: t, e: e}
	defer r.clean()
	c := official("warmup")
	c.plugins = append(c.plugins, `{"type": "firewall"}`)
	space := r.space()
	r.chainDel(c, space, 8080, r.chainAdd(c, space, 8080))
	r.podman("run", "--rm", "--network", "none", engine.Image, "true")
}

// run runs one case.
func run(t *testing.T, e *engine.CNI, c testCase) {
	r := &rig{T: t, e: e}
	e.Restored(t, r.clean, func() { c.run(r) })
}

// clean removes the networks and the namespaces of the case, with what is in them.
func (r *rig) clean() {
	r.forget()
	for _, name := range r.spaces {
		r.dropSpace(name)
	}
}
