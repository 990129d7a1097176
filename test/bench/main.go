// Command bench measures usernet's networks beside the kernel's own, Docker's bridge and the other user-mode networks,
// with one load in one run, and prints tables in Markdown. The machines it runs on differ and are shared: only the
// ratios of one run mean anything.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/bench/load"
	"github.com/usernet/usernet/test/engine"
)

// config is what the command line says.
type config struct {
	rounds             int
	length             time.Duration
	idle               int // connections
	subjects, measures *regexp.Regexp
	out                string
}

func main() {
	engine.Holder()
	var err error
	if len(os.Args) > 1 && os.Args[1] == "agent" {
		err = agent(os.Args[2:])
	} else {
		err = bench(os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// agent is what runs in the namespaces under measurement.
func agent(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("usage: bench agent SOCKET ADDRESS:PORT")
	}
	listen, err := netip.ParseAddrPort(args[1])
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return load.Serve(ctx, args[0], listen)
}

func bench(args []string) error {
	cfg, err := parse(args)
	if err != nil {
		return err
	}
	descriptors, err := raiseLimit()
	if err != nil {
		return err
	}
	cfg.idle = min(cfg.idle, descriptors*9/20) // a relayed connection takes two descriptors of its forwarder
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	report, err := measureAll(ctx, cfg)
	if report != nil {
		err = errors.Join(err, report.markdown(os.Stdout))
		if cfg.out != "" {
			err = errors.Join(err, report.save(cfg.out))
		}
	}
	return err
}

// raiseLimit raises the limit of descriptors, for all that is started from here on, as far as it may.
func raiseLimit() (int, error) {
	limit := syscall.Rlimit{Cur: 1 << 17, Max: 1 << 17}
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		return 1 << 17, nil
	}
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("get the limit of descriptors: %w", err)
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("raise the limit of descriptors to %d: %w", limit.Max, err)
	}
	return int(limit.Max), nil
}

func parse(args []string) (cfg config, err error) {
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	f.IntVar(&cfg.rounds, "rounds", 5, "how often everything is measured; the median counts")
	seconds := f.Float64("seconds", 1, "how long one load takes")
	f.IntVar(&cfg.idle, "idle", 10_000, "connections of the measure idle; 200 where loads are shorter than 0.5 s")
	subjects := f.String("subjects", "", "regular expression of the networks to measure; kernel veth always is")
	measures := f.String("measures", "", "regular expression of the measures: "+measureNames())
	f.StringVar(&cfg.out, "out", "", "directory to write benchmarks.md and benchmarks.svg to")
	f.Parse(args)
	cfg.length = time.Duration(*seconds * float64(time.Second))
	if cfg.length < 500*time.Millisecond {
		cfg.idle = min(cfg.idle, 200)
	}
	if cfg.rounds < 1 || cfg.length <= 0 || f.NArg() > 0 {
		return cfg, fmt.Errorf("want at least one round, loads longer than 0 s and no arguments")
	}
	if cfg.subjects, err = regexp.Compile(*subjects); err != nil {
		return cfg, err
	}
	cfg.measures, err = regexp.Compile(*measures)
	return cfg, err
}

// measureAll returns what was measured even with an error.
func measureAll(ctx context.Context, cfg config) (_ *report, err error) {
	e, err := engine.New(ctx, engine.Docker28())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	if err := e.StartUsernet(ctx, usernetFlags...); err != nil {
		return nil, err
	}
	b := &rig{Engine: e, ctx: ctx, config: cfg}
	defer b.finish()
	if err := b.prepare(); err != nil {
		return nil, err
	}
	r := newReport(b)
	for round := range cfg.rounds {
		for _, m := range measures {
			if !cfg.measures.MatchString(m.name) {
				continue
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, cfg.rounds, m.name)
			if err := b.measure(r, m, round); err != nil {
				return r, err
			}
		}
	}
	return r, errors.Join(b.failures...)
}

// patience is how many failures of our own subjects end the run: what is broken for good only takes time.
const patience = 10

// measure takes m of every subject, beginning with another one each round, so that nobody is always first.
func (b *rig) measure(r *report, m measure, round int) error {
	for i := range b.subjects {
		s := b.subjects[(i+round)%len(b.subjects)]
		if s.site == nil || !m.suits(s) {
			continue
		}
		if err := b.ctx.Err(); err != nil {
			return err
		}
		values, err := m.run(b, s)
		if err != nil {
			err = fmt.Errorf("%s: %s: %w", s, m.name, err)
			fmt.Fprintln(os.Stderr, err)
			r.failed(s, m, err)
			if s.own {
				b.failures = append(b.failures, err)
			}
			if len(b.failures) == patience {
				return errors.Join(b.failures...)
			}
		}
		r.add(s, m, values)
	}
	return nil
}
