// Package gateway is the host's side of a network of virtual machines: it joins the network itself (usermode/vmnet) with the
// sockets that machines and hypervisors come by, the forwards from the host (driver/gateway/forward), the ports that
// machines publish (vsock/publish), DNS, and the API that gvproxy's clients know (driver/gvproxy). It reads no flags.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gateway/forward"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/usermode/vmnet"
	"github.com/usernet/usernet/vsock/publish"
)

// Gateway is the network of virtual machines on one host. It implements gvproxy.Gateway.
type Gateway struct {
	cfg Config
	log *slog.Logger

	net       *vmnet.Network
	machines  *machines
	forwards  *forwards
	names     *names
	upstream  upstream
	published *publish.Server
	events    *gvproxy.Notifier
}

// New checks cfg and makes a gateway, which must be Run.
func New(cfg Config) (*Gateway, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	g := &Gateway{cfg: cfg, log: cfg.Log, upstream: newUpstream(cfg.Log), names: newNames(cfg.Zones)}
	cfg.Network.Log = cfg.Log
	if cfg.SearchHost {
		cfg.Network.Search = g.upstream.Search()
	}
	var err error
	if g.net, err = vmnet.New(cfg.Network); err != nil {
		return nil, err
	}
	g.events = gvproxy.NewNotifier(cfg.Notify, cfg.Log)
	g.machines = newMachines(g.net.Switch(), g.events, cfg.Log)
	g.forwards = newForwards(g.open)
	g.published = publish.NewServer(publish.ServerConfig{
		Log: cfg.Log, Guest: guestName,
		Holder: func(proto usernet.Proto, at netip.AddrPort) string {
			return g.forwards.holder(gvproxy.Proto(proto), at)
		},
	})
	return g, nil
}

// Run listens everywhere, notifies whoever waits that the gateway is ready, and carries traffic until ctx is done or the machines
// have left for good (Hypervisors.Linger, In); then it returns nil. Everything has ended then, and the files that it has
// made are gone. It is called once.
func (g *Gateway) Run(ctx context.Context) error {
	// What is below the sockets ends after them.
	below, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	under, below := errgroup.WithContext(below)
	under.Go(func() error { return g.net.Run(below) })
	under.Go(func() error { return g.events.Run(below) })
	under.Go(func() error { return g.upstream.Run(below) })

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(below, stop)
	err := g.serve(ctx, stop)
	end()
	return errors.Join(err, under.Wait())
}

// service is something that listens, or has otherwise been set up. run serves until ctx is done and takes it down; close is for the
// case that it does not come to that.
type service struct {
	run   func(ctx context.Context) error
	close func() error
}

// serve sets everything up, serves until ctx is done, and takes it down. stop ends ctx.
func (g *Gateway) serve(ctx context.Context, stop func()) (err error) {
	defer func() { err = errors.Join(err, g.forwards.end()) }()
	services, err := g.setUp(ctx, stop)
	if err != nil {
		for _, s := range slices.Backward(services) {
			err = errors.Join(err, s.close())
		}
		return err
	}
	serving, ctx := errgroup.WithContext(ctx)
	for _, s := range services {
		serving.Go(func() error { return s.run(ctx) })
	}
	serving.Go(func() error { return g.published.Run(ctx) })
	serving.Go(func() error { return g.expire(ctx) })
	g.events.Send(gvproxy.Ready, gvproxy.MAC{})
	g.log.Info("ready", "subnet", g.cfg.Network.Subnet, "subnet6", g.cfg.Network.Subnet6, "mtu", g.cfg.Network.MTU)
	return serving.Wait()
}

// setUp opens all sockets and files. With an error, it returns what has been opened.
func (g *Gateway) setUp(ctx context.Context, stop func()) (all []service, err error) {
	add := func(s service, err error) error {
		if err == nil {
			all = append(all, s)
		}
		return err
	}
	for _, f := range g.cfg.Forwards {
		if err := g.forwards.add(ctx, f, netip.Addr{}); err != nil {
			return all, fmt.Errorf("forward %s %s: %w", f.Proto, f.Local, err)
		}
	}
	for _, f := range g.cfg.Sockets {
		if err := add(g.openSocket(ctx, f)); err != nil {
			return all, fmt.Errorf("forward %s %s: %w", f.Proto, f.Local, err)
		}
	}
	if g.cfg.Capture != "" {
		if err := add(g.capture()); err != nil {
			return all, err
		}
	}
	for _, open := range []func() (service, error){g.serveNames, g.serveInside} {
		if err := add(open()); err != nil {
			return all, err
		}
	}
	for _, open := range g.doors() {
		if err := add(open()); err != nil {
			return all, err
		}
	}
	for _, open := range g.hypervisors(stop) {
		if err := add(open()); err != nil {
			g.events.Send(gvproxy.HypervisorError, gvproxy.MAC{})
			return all, err
		}
	}
	if g.cfg.PIDFile != "" {
		return all, add(g.writePID())
	}
	return all, nil
}

// open opens a forward on the host.
func (g *Gateway) open(ctx context.Context, f gvproxy.Forward) (io.Closer, error) {
	opened, err := forward.Open(ctx, f, g.net, g.log)
	if err != nil {
		return nil, err // not opened: a nil in it would not be nil
	}
	return opened, nil
}

func (g *Gateway) openSocket(ctx context.Context, f gvproxy.Forward) (service, error) {
	opened, err := g.open(ctx, f)
	if err != nil {
		return service{}, err
	}
	return service{
		run: func(ctx context.Context) error {
			<-ctx.Done()
			return opened.Close()
		},
		close: opened.Close,
	}, nil
}

// expireEvery is how often it is looked whether guests are still there.
const expireEvery = 10 * time.Second

// expire ends forwards of guests that are gone.
func (g *Gateway) expire(ctx context.Context) error {
	tick := time.NewTicker(expireEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, f := range g.forwards.expire(now, g.present) {
				g.log.Info("forward ended: its guest is gone", "proto", f.Proto, "local", f.Local, "remote", f.Remote)
			}
		}
	}
}

// present tells whether the guest that has an address is there. Whose address it is, leases tell; who has none is there as long as
// anybody is.
func (g *Gateway) present(guest netip.Addr) bool {
	for _, l := range g.net.Leases() {
		if l.Addr == guest {
			return g.machines.has(l.MAC)
		}
	}
	return g.machines.has(l2.MAC{})
}

// Forwards implements gvproxy.Forwarder.
func (g *Gateway) Forwards() []gvproxy.Forward { return g.forwards.all() }

// Expose implements gvproxy.Forwarder. The forward stays until Unexpose.
func (g *Gateway) Expose(ctx context.Context, f gvproxy.Forward) error {
	return g.forwards.add(ctx, f, netip.Addr{})
}

// Unexpose implements gvproxy.Forwarder.
func (g *Gateway) Unexpose(_ context.Context, key gvproxy.Key, to netip.Addr) error {
	return g.forwards.remove(key, to)
}

// guests is the gateway as guests have it: their forwards end when they are gone.
type guests struct{ *Gateway }

// Expose makes a forward for the guest that it leads to.
func (g guests) Expose(ctx context.Context, f gvproxy.Forward) error {
	return g.forwards.add(ctx, f, f.Target.Addr())
}

// Zones implements gvproxy.Names.
func (g *Gateway) Zones() []gvproxy.Zone { return g.names.all() }

// AddZone implements gvproxy.Names.
func (g *Gateway) AddZone(z gvproxy.Zone) error {
	g.names.add(z)
	return nil
}

// Leases implements gvproxy.Switch.
func (g *Gateway) Leases() map[netip.Addr]gvproxy.MAC {
	leases := map[netip.Addr]gvproxy.MAC{g.cfg.Network.Gateway: gvproxy.MAC(g.cfg.Network.MAC)}
	for _, l := range g.net.Leases() {
		leases[l.Addr] = l.MAC
	}
	return leases
}

// CAM implements gvproxy.Switch.
func (g *Gateway) CAM() map[gvproxy.MAC]int {
	cam := make(map[gvproxy.MAC]int)
	for mac, port := range g.net.Switch().Table() {
		cam[gvproxy.MAC(mac)] = port
	}
	return cam
}

// Stats implements gvproxy.Switch.
func (g *Gateway) Stats() gvproxy.Stats {
	s := gvproxy.Stats{Counters: g.net.Stats().Stack}
	s.BytesSent, s.BytesReceived = g.machines.bytes()
	return s
}

// DialGuest implements gvproxy.Streams.
func (g *Gateway) DialGuest(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return g.net.DialTCP(ctx, netip.AddrPort{}, to)
}

// Attach implements gvproxy.Streams.
func (g *Gateway) Attach(ctx context.Context, conn net.Conn, early []byte) error {
	opts := l2.Options{Framing: l2.HyperKit, MTU: g.cfg.Network.MTU, Early: early}
	return g.machines.carry(ctx, l2.Stream(conn, opts), "connect")
}

// connect is the handler of /connect and of what usernet's agents ask for behind it.
func (g *Gateway) connect(w http.ResponseWriter, r *http.Request) {
	conn, opts, err := l2.Connect(w, r, l2.AllOffload)
	if err != nil {
		g.log.Warn("connect", "guest", guestName(r), "err", err)
		return
	}
	opts.MTU = g.cfg.Network.MTU
	if err := g.machines.carry(r.Context(), l2.Stream(conn, opts), "connect"); err != nil {
		g.log.Warn("connect", "guest", guestName(r), "err", err)
	}
}
