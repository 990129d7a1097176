package vm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/engine"
	"github.com/usernet/usernet/test/vm/console"
)

const (
	flooding = 128 << 20 // bytes of datagrams for the machine that hangs
	pace     = 4 << 20   // bytes of the other one's stream, whose time is taken
	// mostMemory is what the gateway may take for a machine that hangs: 16 MiB wait for it at most, which are twice as much before garbage is
	// collected, and the connections have their buffers.
	mostMemory = 80 << 20
)

// hangs stops a machine that is in the middle of receiving, from the outside and from the other one, as when its hypervisor is
// stopped or swapped out. The other one goes on, and the gateway keeps its memory. When the machine goes on, nothing is lost.
func hangs(g, o *guest) {
	g.Helper()
	steady, halting := o.flow(o.echo), g.flow(g.echo)
	g.passes(halting, 1)
	both := g.passes(steady, pace)
	mutual := o.sends(g, 8<<20)
	before := g.memory("VmRSS")

	g.must(g.qemu.Signal(syscall.SIGSTOP))
	g.Cleanup(func() { g.qemu.Signal(syscall.SIGCONT) }) // what is in it is told to end
	g.stuck(halting)
	g.flood(g.knock, flooding)
	o.floods(g)
	alone := g.passes(steady, pace)
	more := g.memory("VmHWM") - before
	g.Logf("%s hangs: from %s come %d MiB in %v, before that in %v; the gateway takes %d MiB more", g.name, o.name, pace>>20,
		alone.Round(time.Millisecond), both.Round(time.Millisecond), more>>20)
	g.completes(steady)
	if alone > 3*both+longPause {
		g.Errorf("%s stands still when %s hangs", o.name, g.name)
	}
	if more > mostMemory {
		g.Errorf("the gateway has %d MiB more when %s hangs", more>>20, g.name)
	}
	o.works(want("peer "+hostIP+":"), "probe", "fetch", "http://"+engine.FarName+"/")
	o.works(want("1 packets received"), "ping", "-c", "1", "-W", "10", gateway)
	o.page(o.outside(), o.web, "hello from "+o.name)
	select {
	case <-mutual.Ended():
		_, err := mutual.Wait(g.Context())
		g.Errorf("what %s sends does not wait for %s: %v", o.name, g.name, err)
	default:
	}

	start := time.Now()
	g.must(g.qemu.Signal(syscall.SIGCONT))
	g.passes(halting, 1<<20)
	g.Logf("%s goes on after %v", g.name, time.Since(start).Round(time.Millisecond))
	g.completes(halting)
	ctx, cancel := context.WithTimeout(g.Context(), patience)
	defer cancel()
	if out, err := mutual.Wait(ctx); err != nil {
		g.Errorf("%s to %s: %q, %v", o.name, g.name, out, err)
	}
	g.reached(o)
}

// sends has the machine send bytes to the echo server of another one, and waits until they are connected.
func (g *guest) sends(o *guest, bytes int) *console.Process {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), patience)
	defer cancel()
	p, err := g.guest.Start(ctx, console.Command{
		Args: []string{"probe", "bulk", o.addr + ":7", strconv.Itoa(bytes)}, Env: []string{"PROBE_PATIENCE=10s"},
	})
	g.must(err)
	g.Cleanup(func() { g.kill(p) })
	connected := regexp.MustCompile(regexp.QuoteMeta(o.addr) + `:7 +ESTABLISHED`)
	g.wait("the connection", func() error {
		out, err := g.try("netstat", "-tn")
		if err == nil && !connected.MatchString(out) {
			err = fmt.Errorf("none to %s:7: %s", o.addr, out)
		}
		return err
	})
	return p
}

// flood sends datagrams from the outside, as fast as they go.
func (r *rig) flood(addr string, bytes int) {
	r.Helper()
	conn, err := engine.Dial(r.Context(), r.outside(), "udp", addr)
	r.must(err)
	defer conn.Close()
	for b := make([]byte, 8000); bytes > 0; bytes -= len(b) {
		_, err := conn.Write(b)
		r.must(err)
	}
}

// floods has the machine send a few megabytes to another one that does not answer, more than may wait there, and without a window.
func (g *guest) floods(o *guest) {
	g.Helper()
	out, err := g.try("ping", "-q", "-c", "60", "-i", "0.01", "-s", "60000", "-W", "1", o.addr)
	if !errors.Is(err, console.ErrCommand) {
		g.Errorf("ping a machine that hangs: %v", err)
	}
	g.check(contains(out, "60 packets transmitted, 0 packets received"))
}

// memory is what /proc says of the gateway's memory, in bytes.
func (r *rig) memory(what string) int {
	r.Helper()
	text, err := os.ReadFile(r.m.Path("/proc/" + r.on("cat", r.pidFile()) + "/status"))
	r.must(err)
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == what+":" && f[2] == "kB" {
			n, err := strconv.Atoi(f[1])
			r.must(err)
			return n << 10
		}
	}
	r.Fatalf("no %s in %s", what, text)
	return 0
}
