// Command bench measures usernet's networks beside Docker's own bridge on one engine in one run, and prints a table in
// Markdown. The machines it runs on differ and are shared: only the ratios of one run mean anything.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// subject is one kind of network under measurement.
type subject struct {
	name   string
	create []string // arguments of docker network create
}

var subjects = []subject{
	{"Docker bridge", []string{"-d", "bridge"}},
	{"usernet bridge", []string{"-d", "usernet", "-o", "mode=bridge"}},
	{"usernet usermode", []string{"-d", "usernet"}},
}

// measure is one row of the table.
type measure struct {
	name   string
	unit   string
	lower  bool // the lower the better
	format string
	run    func(*bench, subject) (float64, error)
}

var measures = []measure{
	{"network create + run + rm + network rm", "ms", true, "%.0f", (*bench).lifecycle},
	{"run + rm with a published port", "ms", true, "%.0f", (*bench).published},
	{"container to container, TCP", "Gbit/s", false, "%.1f", (*bench).neighbour},
	{"container to container, round trip p50", "µs", true, "%.0f", (*bench).neighbourRTT},
	{"container to outside, TCP", "Gbit/s", false, "%.1f", (*bench).outward},
	{"outside to container, TCP", "Gbit/s", false, "%.1f", (*bench).inward},
	{"published port, TCP into the container", "Gbit/s", false, "%.1f", (*bench).portUp},
	{"published port, TCP out of the container", "Gbit/s", false, "%.1f", (*bench).portDown},
	{"published port, round trip p50", "µs", true, "%.0f", (*bench).portRTT},
}

func main() {
	engine.Holder()
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		if err := agent(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench agent:", err)
			os.Exit(1)
		}
		return
	}
	rounds := flag.Int("rounds", 5, "how often everything is measured; the median counts")
	seconds := flag.Float64("seconds", 2, "how long one transfer takes")
	docker := flag.String("docker", "28", "which Docker: 20 or 28")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *docker, *rounds, time.Duration(*seconds*float64(time.Second))); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, docker string, rounds int, length time.Duration) (err error) {
	kind := engine.Docker28()
	if docker == "20" {
		kind = engine.Docker20()
	}
	e, err := engine.New(ctx, kind)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := e.Close(); err == nil {
			err = cerr
		}
	}()
	if err := e.StartUsernet(ctx, "--log-level", "warn"); err != nil {
		return err
	}
	b := &bench{Engine: e, ctx: ctx, length: length}
	if err := b.prepare(); err != nil {
		return err
	}
	defer b.finish()
	results := map[[2]string][]float64{}
	for round := range rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, rounds)
		for _, m := range measures {
			for i := range subjects {
				s := subjects[(i+round)%len(subjects)] // nobody is always first
				v, err := m.run(b, s)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", s.name, m.name, err)
				}
				results[[2]string{m.name, s.name}] = append(results[[2]string{m.name, s.name}], v)
			}
		}
	}
	b.print(os.Stdout, kind, rounds, results)
	return nil
}

func median(vs []float64) float64 {
	vs = slices.Clone(vs)
	slices.Sort(vs)
	return vs[len(vs)/2]
}

// print writes the table: medians, and in brackets how many times better than the first subject.
func (b *bench) print(w io.Writer, kind engine.Kind, rounds int, results map[[2]string][]float64) {
	version, _ := b.Docker(b.ctx, "version", "--format", "{{.Server.Version}}")
	own, _ := b.Usernet(b.ctx, "version")
	kernel, _ := exec.Command("uname", "-r").Output()
	fmt.Fprintf(w, "Docker %s (%s), %s, Linux %s, %d CPUs; median of %d rounds; ×: better than %s by\n\n",
		version, kind.Name, own, strings.TrimSpace(string(kernel)), runtime.NumCPU(), rounds, subjects[0].name)
	fmt.Fprint(w, "| |")
	for _, s := range subjects {
		fmt.Fprintf(w, " %s |", s.name)
	}
	fmt.Fprint(w, "\n|---|"+strings.Repeat("---|", len(subjects))+"\n")
	for _, m := range measures {
		fmt.Fprintf(w, "| %s, %s |", m.name, m.unit)
		base := median(results[[2]string{m.name, subjects[0].name}])
		for i, s := range subjects {
			v := median(results[[2]string{m.name, s.name}])
			fmt.Fprintf(w, " "+m.format, v)
			if i > 0 {
				ratio := v / base
				if m.lower {
					ratio = base / v
				}
				fmt.Fprintf(w, " (×%.2f)", ratio)
			}
			fmt.Fprint(w, " |")
		}
		fmt.Fprintln(w)
	}
}

// bench is the engine with what the measurements share.
type bench struct {
	*engine.Engine
	ctx    context.Context
	length time.Duration
	far    *server // in the namespace outside
}

// prepare makes one network of each kind with two containers that answer, and a server outside.
func (b *bench) prepare() error {
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.Dir, "bin/bench"), exe, 0o755); err != nil {
		return err
	}
	err = b.Outside().Do(func() (err error) {
		b.far, err = listen(engine.FarAddr.String() + ":9000")
		return err
	})
	if err != nil {
		return err
	}
	for i, s := range subjects {
		net := fmt.Sprintf("net%d", i)
		if _, err := b.Docker(b.ctx, append(append([]string{"network", "create"}, s.create...), net)...); err != nil {
			return err
		}
		for _, c := range []string{"a", "b"} {
			_, err := b.Docker(b.ctx, "run", "-d", "--name", c+net, "--network", net, "-v", filepath.Join(b.Dir, "bin/bench")+":/bench:ro",
				"-p", fmt.Sprintf("%d:9000", port(i, c)), engine.Image, "/bench", "agent", "serve", ":9000")
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func port(subject int, container string) int { return 9000 + 10*subject + int(container[0]-'a') }

func (b *bench) finish() {
	b.far.close()
	for i := range subjects {
		net := fmt.Sprintf("net%d", i)
		b.Docker(b.ctx, "rm", "-f", "a"+net, "b"+net)
		b.Docker(b.ctx, "network", "rm", net)
	}
}

func index(s subject) int {
	return slices.IndexFunc(subjects, func(o subject) bool { return o.name == s.name })
}

// time runs docker commands and returns the milliseconds they took together.
func (b *bench) time(commands ...[]string) (float64, error) {
	start := time.Now()
	for _, args := range commands {
		if _, err := b.Docker(b.ctx, args...); err != nil {
			return 0, err
		}
	}
	return float64(time.Since(start).Microseconds()) / 1000, nil
}

func (b *bench) lifecycle(s subject) (float64, error) {
	return b.time(
		append(append([]string{"network", "create"}, s.create...), "life"),
		[]string{"run", "--name", "lives", "--network", "life", engine.Image, "true"},
		[]string{"rm", "lives"},
		[]string{"network", "rm", "life"},
	)
}

func (b *bench) published(s subject) (float64, error) {
	return b.time([]string{"run", "--rm", "--network", fmt.Sprintf("net%d", index(s)), "-p", "7000:80", "-p", "7001:81", engine.Image, "true"})
}

// inside has the agent of container a drive a load and returns the result.
func (b *bench) inside(s subject, addr, what string) (float64, error) {
	out, err := b.Docker(b.ctx, "exec", fmt.Sprintf("anet%d", index(s)), "/bench", "agent", "drive", addr, what, b.length.String())
	if err != nil {
		return 0, err
	}
	var v float64
	_, err = fmt.Sscan(out, &v)
	return v, err
}

func (b *bench) neighbour(s subject) (float64, error) {
	return b.inside(s, fmt.Sprintf("bnet%d:9000", index(s)), "up")
}

func (b *bench) neighbourRTT(s subject) (float64, error) {
	return b.inside(s, fmt.Sprintf("bnet%d:9000", index(s)), "rtt")
}

func (b *bench) outward(s subject) (float64, error) {
	return b.inside(s, engine.FarAddr.String()+":9000", "up")
}

func (b *bench) inward(s subject) (float64, error) {
	return b.inside(s, engine.FarAddr.String()+":9000", "down")
}

// outside drives a load from the namespace outside on the port that container a published.
func (b *bench) outside(s subject, what string) (float64, error) {
	addr := fmt.Sprintf("%s:%d", engine.HostAddr.Addr(), port(index(s), "a"))
	var c *client
	err := b.Outside().Do(func() (err error) {
		c, err = dial(addr)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return c.drive(what, b.length)
}

func (b *bench) portUp(s subject) (float64, error)   { return b.outside(s, "up") }
func (b *bench) portDown(s subject) (float64, error) { return b.outside(s, "down") }
func (b *bench) portRTT(s subject) (float64, error)  { return b.outside(s, "rtt") }
