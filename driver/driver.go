// Package driver is the table of networks and endpoints: it decides what happens in which order, holds the locks,
// writes everything down before the kernel is touched, takes half-done work back, and after a crash makes the kernel
// agree with what was written. The doors in its subdirectories turn protocols into calls of it; how a link, a port or a
// firewall rule is made is known below it.
package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/dns/resolvconf"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/hostnet"
	"github.com/usernet/usernet/internal/redirect"
	"github.com/usernet/usernet/ipam"
	"github.com/usernet/usernet/portmap"
	"github.com/usernet/usernet/usermode"
	"github.com/usernet/usernet/vsock/publish"
)

// Config says where a driver keeps its things.
type Config struct {
	StateDir   string        // what must survive a reboot: the networks
	RunDir     string        // what belongs to one boot: endpoints, namespaces
	Rootless   bool          // the host's network is not ours to change
	CheckEvery time.Duration // how often the kernel is compared with the table; 0 means 30 s
	// HostGateway publishes ports on the host of the virtual machine that this is, as well as here; it is run by the caller. nil: there is none.
	HostGateway *publish.Client
	Log         *slog.Logger
}

// ErrClosed says that the driver is shutting down.
var ErrClosed = errors.New("usernet is shutting down")

// ErrExhausted says that a network has no address left, or the host no subnet.
var ErrExhausted = ipam.ErrExhausted

// Driver is the table. Its methods may be called from any number of goroutines; one network does one thing at a time.
type Driver struct {
	cfg    Config
	store  *store
	mapper *portmap.Mapper
	host   *hostnet.Watcher
	rules  rules

	redirects redirect.Table // published ports that their askers hold
	claims    claims

	resolvers *resolvconf.Follower // the host's DNS servers
	directory directory

	ctx  context.Context // what networks run under; done when the driver closes
	stop context.CancelFunc

	keepers sync.WaitGroup // one for each network

	mu       sync.Mutex
	networks map[string]*network
	closed   bool
}

// Open opens the store and brings every network and endpoint in it back to life: what the kernel still has is taken as
// it is, what it lost is made again, what the store does not know is removed. Close ends it.
func Open(cfg Config) (_ *Driver, err error) {
	if cfg.CheckEvery == 0 {
		cfg.CheckEvery = 30 * time.Second
	}
	d := &Driver{cfg: cfg, resolvers: resolvconf.NewFollower(resolvconf.Path, cfg.Log), mapper: portmap.New(cfg.Log), networks: map[string]*network{}}
	d.host = hostnet.New(d.ownsBridge)
	d.rules.log = cfg.Log
	d.claims.freed = d.kickAll
	d.ctx, d.stop = context.WithCancel(context.Background())
	if d.store, err = openStore(cfg.StateDir, cfg.RunDir); err != nil {
		return nil, err
	}
	if err := d.restore(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Run keeps the host's state as it should be until ctx is done: it follows the links of others and the host's DNS
// servers, and checks the firewall from time to time and whenever recheck delivers.
func (d *Driver) Run(ctx context.Context, recheck <-chan struct{}) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.host.Run(ctx, func() { d.rules.setForeign(d.host.Bridges()) }) })
	// Links leave this namespace for containers, and are made in it for containers to come.
	g.Go(func() error { return endpoint.WatchHome(ctx, d.kickAll) })
	g.Go(func() error { return d.resolvers.Run(ctx) })
	g.Go(func() error {
		tick := time.NewTicker(d.cfg.CheckEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-recheck:
			case <-ctx.Done():
				return nil
			}
			d.rules.check()
			d.checkRedirects()
			d.kickAll()
		}
	})
	return g.Wait()
}

// checkRedirects repairs what others have done to our redirections.
func (d *Driver) checkRedirects() {
	repaired, err := d.redirects.Check()
	switch {
	case err != nil:
		d.cfg.Log.Error("redirected ports are not checked", "error", err)
	case repaired:
		d.cfg.Log.Info("somebody changed the firewall; our redirections are back")
	}
}

// kickAll asks every network to look after itself soon.
func (d *Driver) kickAll() {
	for _, n := range d.all() {
		n.kick()
	}
}

// Close stops the traffic and lets go of everything without taking it out of the kernel: containers keep their
// interfaces, and the next Open finds them.
func (d *Driver) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.stop()
	var errs []error
	for _, n := range d.all() {
		n.mu.Lock()
		errs = append(errs, n.release())
		n.mu.Unlock()
	}
	d.keepers.Wait()
	return errors.Join(append(errs, d.store.close())...)
}

func (d *Driver) namespaceDir() string { return filepath.Join(d.cfg.RunDir, "netns") }

// all returns the networks of the table, to be locked one at a time.
func (d *Driver) all() []*network {
	d.mu.Lock()
	defer d.mu.Unlock()
	ns := make([]*network, 0, len(d.networks))
	for _, n := range d.networks {
		ns = append(ns, n)
	}
	return ns
}

// lock returns the network with its lock held.
func (d *Driver) lock(id string) (*network, error) {
	d.mu.Lock()
	n, closed := d.networks[id], d.closed
	d.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	if n != nil {
		n.mu.Lock()
		if !n.dead {
			return n, nil
		}
		n.mu.Unlock()
	}
	return nil, fmt.Errorf("network %.12s: %w", id, usernet.ErrNotFound)
}

// ownsBridge tells whether a bridge in the host's namespace is one of our networks'.
func (d *Driver) ownsBridge(name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.networks {
		if n.Options.Mode == usernet.Bridge && n.BridgeName() == name {
			return true
		}
	}
	return false
}

// restore makes the kernel agree with the store. A network that cannot be brought back is logged and kept, so that
// the others work and a later start may succeed.
func (d *Driver) restore() error {
	saved, err := d.store.loadNetworks()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	d.rules.held = true
	for _, s := range saved {
		n := d.newNetwork(s.network())
		n.added, n.name, n.transient, n.naming = s.Added, s.Name, s.transient, s.Names
		if s.Creating {
			n.end()
			if err := n.discard(); err != nil {
				d.cfg.Log.Warn("half-made network is left", "network", s.ID, "error", err)
			}
			continue
		}
		known[shortID(s.ID)] = true
		d.networks[s.ID] = n
		if err := n.restore(); err != nil {
			d.cfg.Log.Error("network is not restored", "network", s.ID, "error", err)
		}
	}
	if err := d.rules.resume(); err != nil {
		d.cfg.Log.Error("firewall is not up to date", "error", err)
	}
	if err := d.redirects.Sweep(); err != nil {
		d.cfg.Log.Debug("there is no looking for old redirections", "error", err)
	}
	pinned, err := usermode.Pinned(d.namespaceDir())
	if err != nil {
		return err
	}
	for _, id := range pinned {
		if !known[id] {
			d.cfg.Log.Info("removing a namespace that belongs to no network", "id", id)
			if err := usermode.Remove(d.namespaceDir(), id); err != nil {
				d.cfg.Log.Warn("orphaned namespace is left", "id", id, "error", err)
			}
		}
	}
	return nil
}

// blocked tells whether an address belongs to containers that are not reached through us: another engine's bridge, or
// a bridge network of ours.
func (d *Driver) blocked(a netip.Addr) bool {
	return d.host.Contains(a) || d.rules.contains(a)
}

func shortID(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}
