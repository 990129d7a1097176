// Package oci_test runs containers with real OCI runtimes, runc and crun, and usernet as their hook; and with Podman, which runs hooks
// of its own.
//
//	go test ./test/oci -run 'TestRuntimes/crun/web/bridge' -v
package oci_test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/usernet/usernet/test/engine"
)

// testCase is a test for one runtime and one kind of network. All that it makes is removed after it; then the host must look as it
// did before.
type testCase struct {
	name  string
	modes []string
	run   func(r *rig)
}

var (
	both   = []string{"usermode", "bridge"}
	bridge = []string{"bridge"}
	either = []string{"usermode"} // the kind does not matter
)

var cases = []testCase{
	{"web", both, web},
	{"settings", both, chosen},
	{"names", both, names},
	{"resolvConf", either, resolvConf},
	{"shared", both, shared},
	{"again", both, again},
	{"poststop", both, poststop},
	{"killed", both, killed},
	{"several", both, several},
	{"refused", either, refused},
	{"badState", either, badState},
	{"netns", bridge, dropIn},
	{"walkthrough", bridge, walkthrough},
	{"parallel", both, parallel},
}

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

func TestRuntimes(t *testing.T) {
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			if _, err := exec.LookPath(runtime); err != nil {
				if os.Getenv("USERNET_TEST_STRICT") != "" {
					t.Fatal(err)
				}
				t.Skip(err)
			}
			t.Parallel()
			engine.Bare(t, func(t *testing.T, h *engine.Host) { suite(t, h, runtime) })
		})
	}
}

func suite(t *testing.T, h *engine.Host, runtime string) {
	if err := h.StartUsernet(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Usernet(t.Context(), "ps"); err != nil { // it answers when it has its files
		t.Fatal(err)
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for _, mode := range c.modes {
				t.Run(mode, func(t *testing.T) { run(t, h, runtime, mode, c) })
			}
		})
	}
}

// run runs one case.
func run(t *testing.T, h *engine.Host, runtime, mode string, c testCase) {
	r := &rig{T: t, h: h, runtime: runtime, mode: mode}
	h.Restored(t, func() { r.end(r.made...) }, func() { c.run(r) })
}
