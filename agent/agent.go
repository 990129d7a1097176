// Package agent is a virtual machine's end of its network: a TAP in the machine whose frames a gateway on the host carries, usernet's
// own or gvproxy, over one stream. It makes the TAP, dials the gateway, and again when it has gone, and configures the TAP as the
// gateway's DHCP says. IPv6 is the kernel's: it is told to take router advertisements.
//
// It has no part in what containers in the machine publish, which is the driver's (package vsock/publish).
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

// Config is what an Agent is made of.
type Config struct {
	Gateway vsock.Addr // where the gateway is dialled; zero: it is Command
	// Path is what the gateway is asked for by HTTP, usually /connect, and with it how frames are to be framed. "": they follow at
	// once, in HyperKit's framing.
	Path    string
	Command []string // a program and its arguments whose stdin and stdout are the stream, in HyperKit's framing

	Interface   string // the TAP; it is made where it does not exist, and goes with the agent then
	Preexisting bool   // the TAP is there, and others configure it: only frames are carried
	MAC         l2.MAC // for the TAP; zero: as it is
	MTU         int    // bytes of an IP packet; 0: what DHCP says, or else as it is
	NoDHCP      bool
	ResolvConf  string // the file that gets the resolvers that DHCP names, and its former content back in the end; "": none

	// Wait is the time between an end of the stream and the first attempt to dial again, which doubles up to MaxWait. 0: 100 ms,
	// and a gateway that was there is dialled at once.
	Wait, MaxWait time.Duration

	lookEvery time.Duration // for tests

	Ready func() // called when the TAP has been configured for the first time (without DHCP: connected); nil: nobody wants to know
	Log   *slog.Logger
}

// The waits where Config has none.
const (
	defaultWait    = 100 * time.Millisecond
	defaultMaxWait = 5 * time.Second
)

// Agent carries frames between a TAP and a gateway.
type Agent struct {
	cfg   Config
	ready bool
}

// New checks cfg. It starts nothing.
func New(cfg Config) (*Agent, error) {
	if (cfg.Gateway == vsock.Addr{}) == (len(cfg.Command) == 0) {
		return nil, fmt.Errorf("want a gateway's address or a command: %w", usernet.ErrInvalid)
	}
	if cfg.Interface == "" || len(cfg.Interface) > maxName {
		return nil, fmt.Errorf("interface %.64q: want a name of up to %d bytes: %w", cfg.Interface, maxName, usernet.ErrInvalid)
	}
	if cfg.MTU != 0 && (cfg.MTU < minMTU || cfg.MTU > maxMTU) {
		return nil, fmt.Errorf("mtu %d: want %d to %d: %w", cfg.MTU, minMTU, maxMTU, usernet.ErrInvalid)
	}
	if cfg.MAC[0]&1 != 0 {
		return nil, fmt.Errorf("address %s is a group's: %w", cfg.MAC, usernet.ErrInvalid)
	}
	if cfg.Wait == 0 {
		cfg.Wait = defaultWait
	}
	if cfg.lookEvery == 0 {
		cfg.lookEvery = lookEvery
	}
	if cfg.MaxWait == 0 {
		cfg.MaxWait = max(cfg.Wait, defaultMaxWait)
	}
	if cfg.Preexisting {
		cfg.NoDHCP = true
	}
	if cfg.Ready == nil {
		cfg.Ready = func() {}
	}
	return &Agent{cfg: cfg}, nil
}

// Run carries frames until ctx ends, and takes back what was done then. It dials the gateway for as long as it takes; an error is
// about the TAP.
func (a *Agent) Run(ctx context.Context) (err error) {
	var back undo.List
	defer func() { err = errors.Join(err, back.Close()) }()
	dev, err := openTAP(a.cfg, &back)
	if err != nil {
		return err
	}
	net := &network{cfg: a.cfg, link: dev.link}
	back.Push(func() error { return net.set(settings{}) })

	said := ""
	for wait := a.cfg.Wait; ; {
		began := time.Now()
		err := a.session(ctx, dev, net)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errTAP):
			return err
		case time.Since(began) > a.cfg.MaxWait:
			wait, said = a.cfg.Wait, ""
		}
		level := slog.LevelWarn
		if err.Error() == said {
			level = slog.LevelDebug // a gateway may be away for days
		}
		said = err.Error()
		a.cfg.Log.Log(ctx, level, "no gateway", "error", err, "again in", wait)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, a.cfg.MaxWait)
	}
}

// session is one connection to the gateway. It returns an error always.
func (a *Agent) session(ctx context.Context, dev *tap, net *network) error {
	link, opts, err := a.connect(ctx, dev.takes)
	if err != nil {
		return err
	}
	defer link.Close()
	if err := dev.begin(opts.Takes); err != nil {
		return err
	}
	defer dev.end()
	a.cfg.Log.Info("connected to gateway", "interface", a.cfg.Interface, "framing", opts.Framing, "leaves to gateway", opts.Takes, "takes", dev.takes)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-ctx.Done()
		link.Interrupt()
		dev.interrupt()
		return nil
	})
	var passed traffic
	g.Go(func() error { return newSender(dev, link, &passed.sent).run() })
	g.Go(func() error { return newWriter(dev, link, &passed.heard).run() })
	g.Go(func() error {
		return passed.watch(ctx, a.cfg.lookEvery, func() error { return askGateway(dev.link) })
	})
	if a.cfg.NoDHCP {
		a.isReady()
	} else {
		g.Go(func() error { return a.dhcp(ctx, dev, net) })
	}
	return g.Wait()
}

// isReady tells it, the first time.
func (a *Agent) isReady() {
	if !a.ready {
		a.ready = true
		a.cfg.Ready()
	}
}

// dhcp keeps the TAP configured until ctx ends.
func (a *Agent) dhcp(ctx context.Context, dev *tap, net *network) error {
	c := client{
		server: &wire{iface: a.cfg.Interface, mac: dev.mac},
		was:    net.is.addr.Addr(),
		log:    a.cfg.Log.With("interface", a.cfg.Interface),
		set: func(s settings) error {
			err := net.set(s)
			if err == nil && s.addr.IsValid() {
				a.isReady()
			}
			return err
		},
	}
	c.run(ctx)
	return ctx.Err()
}
