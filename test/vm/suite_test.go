// Package vm_test boots virtual machines, QEMU with a Debian kernel and a vsock by vhost-device-vsock, and gives them their network
// by usernet gateway and usernet agent, by a real gvproxy, and by the real gvforwarder. In one runs a real Docker with usernet. On the
// host, all runs as an ordinary user.
//
//	go test ./test/vm -run 'TestVM/docker' -v
//
// QEMU emulates the processor: one machine runs at a time, two where they are about each other, and nothing here is about speed.
package vm_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/usernet/usernet/test/engine"
)

func TestMain(m *testing.M) {
	engine.Holder()
	os.Exit(m.Run())
}

// How long things may take on an emulated processor of a busy machine: anything, a case with all that is in it, and each step of
// cleaning up, which must not wait for a machine that hangs.
const (
	patience = 3 * time.Minute
	limit    = 6 * time.Minute
	farewell = 20 * time.Second
)

// testCase is a test with a machine of its own.
type testCase struct {
	name    string
	machine machine // zero: run boots what it needs
	run     func(r *rig)
}

var cases = []testCase{
	{"agent", machine{memory: 512, vsock: true}, agent},
	{"stream", machine{memory: 512, nic: true}, stream},
	{"gvproxy", machine{memory: 512, nic: true}, gvproxy},
	{"peers", machine{memory: 512, vsock: true}, peers},
	{"vsock", machine{memory: 512, vsock: true}, vsocks},
	{"guests", machine{}, guests},
	{"docker", machine{memory: 1280, vsock: true}, docker},
}

func TestVM(t *testing.T) {
	engine.WithMachines(t, func(t *testing.T, m *engine.Machines) {
		bin := filepath.Join(m.Dir, "bin")
		build(t, bin)
		initrd := filepath.Join(m.Dir, "initrd")
		makeInitrd(t, initrd, bin)
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				r := &rig{T: t, ctx: ctx, m: m, bin: bin, initrd: initrd}
				if c.machine != (machine{}) {
					r.boot(c.machine)
				}
				c.run(r)
			})
		}
	})
}

// makeInitrd makes the file that machines boot from.
func makeInitrd(t *testing.T, path, bin string) {
	t.Helper()
	w, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(writeInitrd(w, bin), w.Close(), os.Chmod(path, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// build puts into dir the programs that only these tests need.
func build(t *testing.T, dir string) {
	t.Helper()
	for _, args := range [][]string{
		{"build", "-trimpath", "-buildvcs=false", "-o", dir + "/", "../cmd/guest", "../cmd/sshd"},
		{"test", "-c", "-trimpath", "-o", dir + "/", "../../vsock"},
	} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", args[0], err, out)
		}
	}
}
