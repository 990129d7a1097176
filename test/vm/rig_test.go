package vm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
	"github.com/usernet/usernet/test/vm/console"
)

// Addresses of the machines' network, as gvproxy has them, and the MAC address that is given the first one; what comes next is second.
const (
	firstMAC  = "5a:94:ef:e4:0c:ee"
	secondMAC = "5a:94:ef:e4:0c:ef"
	gateway   = "192.168.127.1"
	first     = "192.168.127.2"
	second    = "192.168.127.3"
	hostAlias = "192.168.127.254"
	gateway6  = "fd75:6e65:74:7f::1"
	first6    = "fd75:6e65:74:7f:5894:efff:fee4:cee" // as the machine's kernel makes it of the MAC address
	second6   = "fd75:6e65:74:7f:5894:efff:fee4:cef"
)

// Addresses as they stand in URLs.
var (
	hostIP  = engine.HostAddr.Addr().String()
	hostIP6 = engine.HostAddr6.Addr().String()
	router  = engine.RouterAddr.Addr().String()
	router6 = engine.Router6.Addr().String()
	far     = engine.FarAddr.String()
	far6    = engine.FarAddr6.String()
)

// rig is what a case has in hand: a pretend host, a machine, and ways to do something and fail when that does not work.
type rig struct {
	*testing.T
	ctx    context.Context // ends with the time that the case has
	m      *engine.Machines
	bin    string // the directory of the programs
	initrd string // what machines boot from
	name   string // of the machine, before those of its files; "": it is the only one
	qemu   engine.Daemon
	guest  *console.Client
}

// Context is instead of the test's, which has no end before the test's.
func (r *rig) Context() context.Context { return r.ctx }

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) check(err error) {
	r.Helper()
	if err != nil {
		r.Error(err)
	}
}

// background is for what goes on when the case has had its time.
func (r *rig) background() context.Context { return context.WithoutCancel(r.ctx) }

func (r *rig) host() *netns.NS    { return r.m.NS() }
func (r *rig) outside() *netns.NS { return r.m.Outside().NS() }

// daemon starts a program on the host and waits until ready says so. It goes with the test.
func (r *rig) daemon(ready func() error, name string, args ...string) engine.Daemon {
	r.Helper()
	d, err := r.m.Daemon(nil, name, args...)
	r.must(err)
	r.Cleanup(func() {
		r.check(d.Stop(syscall.SIGTERM))
		r.showLog(name)
	})
	r.must(d.Ready(r.Context(), func(context.Context) error { return ready() }))
	return d
}

// showLog shows the end of a program's log if the test has failed, or if the program has panicked, which fails it.
func (r *rig) showLog(name string) {
	r.Helper()
	if crash := engine.Crash(r.m.Log(name)); crash != "" {
		r.Errorf("%s:\n%s", name, crash)
	}
	if text, err := os.ReadFile(r.m.Log(name)); err == nil && len(text) > 0 && r.Failed() {
		r.Logf("%s:\n%s", name, text[max(0, len(text)-8000):])
	}
}

// in runs a command in the machine, which must succeed, and returns what it prints.
func (r *rig) in(args ...string) string {
	r.Helper()
	out, err := r.try(args...)
	r.must(err)
	return out
}

// try runs a command in the machine.
func (r *rig) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	return r.guest.Do(ctx, console.Command{Args: args, Env: []string{"PROBE_PATIENCE=10s"}})
}

// works runs a command in the machine, which must succeed and print all of want.
func (r *rig) works(want []string, args ...string) {
	r.Helper()
	out, err := r.try(args...)
	if err != nil {
		r.Error(err)
		return
	}
	if err := contains(out, want...); err != nil {
		r.Errorf("%s: %v", strings.Join(args, " "), err)
	}
}

// want is what works and page take.
func want(parts ...string) []string { return parts }

func contains(text string, want ...string) error {
	for _, w := range want {
		if !strings.Contains(text, w) {
			return fmt.Errorf("got %q, want %q in it", text, w)
		}
	}
	return nil
}

// starts starts a program in the machine. It is killed when the test is over.
func (r *rig) starts(name string, args ...string) *console.Process {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	log := "/run/" + name + ".log"
	p, err := r.guest.Start(ctx, console.Command{Args: args, Log: log})
	r.must(err)
	r.Cleanup(func() {
		r.kill(p)
		r.fetchLog(name, log)
	})
	return p
}

// fetchLog has the log of a program in the machine shown like those of the host.
func (r *rig) fetchLog(name, log string) {
	r.Helper()
	text, err := r.read(log)
	if errors.Is(err, console.ErrEnded) {
		return
	}
	r.check(err)
	name += " in the machine"
	r.check(os.WriteFile(r.m.Log(name), []byte(text), 0o600))
	r.showLog(name)
}

// kill ends a program in the machine with SIGKILL. One that has ended is fine.
func (r *rig) kill(p *console.Process) {
	r.Helper()
	r.check(p.Signal(syscall.SIGKILL))
	ctx, cancel := context.WithTimeout(r.background(), farewell)
	defer cancel()
	if _, err := p.Wait(ctx); err != nil && !errors.Is(err, console.ErrCommand) && !errors.Is(err, console.ErrEnded) {
		r.Error(err)
	}
}

// read is the end of a file of the machine.
func (r *rig) read(path string) (string, error) {
	ctx, cancel := context.WithTimeout(r.background(), farewell)
	defer cancel()
	return r.guest.Do(ctx, console.Command{Args: []string{"tail", "-c", "1000000", path}})
}

// wait asks until it is told that all is well. The test ends with the last error if that takes too long, or the machine has ended.
func (r *rig) wait(what string, check func() error) {
	r.Helper()
	var last error
	engine.Wait(r, patience, what, func() error {
		last = check()
		if errors.Is(last, console.ErrEnded) || r.Context().Err() != nil {
			r.Fatalf("%s: %v", what, last)
		}
		return last
	})
	if last != nil {
		r.FailNow()
	}
}

// page fetches a page from a namespace of the host; it must contain all of want.
func (r *rig) page(from *netns.NS, addr string, want ...string) {
	r.Helper()
	r.wait("the page", func() error {
		ctx, cancel := context.WithTimeout(r.Context(), 20*time.Second)
		defer cancel()
		text, err := engine.Get(ctx, from, addr)
		if err != nil {
			return fmt.Errorf("fetch %s: %w", addr, err)
		}
		return contains(text, want...)
	})
}
