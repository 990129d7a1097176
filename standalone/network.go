package standalone

import (
	"context"
	"net/netip"
	"sync"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/dns/resolvconf"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/portmap"
	"github.com/usernet/usernet/usermode"
)

// network is the outer process's side of a fabric: gateway, resolver and published ports.
type network struct {
	cfg     Config
	gateway *usermode.Gateway
	records *dns.Records
	mapper  *portmap.Mapper
	cancel  context.CancelFunc
	serving sync.WaitGroup
}

// openNetwork borrows the fabric of the inner process and serves it.
func openNetwork(cfg Config, in *innerProcess) (*network, error) {
	gateway, err := usermode.Borrow(cfg.gateway(), in.fabric)
	if err != nil {
		return nil, err
	}
	resolver, err := in.resolverSockets()
	if err != nil {
		gateway.Close()
		return nil, err
	}
	n := &network{cfg: cfg, gateway: gateway, mapper: portmap.New(cfg.Log)}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	n.serving.Go(func() {
		if err := gateway.Run(ctx); err != nil {
			cfg.Log.Error("the network has stopped", "error", err)
		}
	})
	n.serveNames(ctx, resolver)
	return n, nil
}

func (n *network) close() {
	n.cancel()
	n.serving.Wait()
	n.gateway.Close()
}

// publish publishes ports of the command at the addresses, and returns what takes all of them back.
func (n *network) publish(owner string, ports []usernet.Port, a4, a6 netip.Addr) (release func(), err error) {
	var done []*portmap.Forward
	release = func() {
		for _, f := range done {
			f.Close()
		}
	}
	for _, p := range ports {
		f, err := n.mapper.Publish(portmap.Request{Owner: owner, Port: p, Addr4: a4, Addr6: a6, Dialer: n.gateway})
		if err != nil {
			release()
			return nil, err
		}
		done = append(done, f)
		if p.HostPort == 0 || p.HostPortEnd > p.HostPort {
			n.cfg.Log.Info("published", "port", f.Port().String())
		}
	}
	return release, nil
}

// gateway is the network's gateway as both processes see it.
func (c Config) gateway() usermode.Config {
	g := usermode.Config{
		ID:       c.Network.ID,
		Bridge:   endpoint.FabricBridge,
		Subnets:  c.Network.Subnets,
		MTU:      c.Network.MTU(),
		Internal: c.Network.Internal,
		FastPath: c.Network.Options.FastPath,
		Log:      c.Log,
	}
	if c.NoEgress {
		g.Blocked = func(netip.Addr) bool { return true }
	}
	return g
}

// domain is the search domain of shared networks.
const domain = "usernet.internal"

// serveNames answers the commands' questions, at the gateway's addresses.
func (n *network) serveNames(ctx context.Context, s sockets) {
	var gateways []netip.Addr
	var subnets []netip.Prefix
	for _, s := range n.cfg.Network.Subnets {
		gateways, subnets = append(gateways, s.Gateway), append(subnets, s.Prefix)
	}
	n.records = dns.NewRecords(dns.Network{Domains: []string{domain}, Subnets: subnets, Gateway: gateways})
	c := dns.Config{Sources: []dns.Source{n.records}, Log: n.cfg.Log}
	switch {
	case n.cfg.NoEgress || n.cfg.Network.Internal:
	case len(n.cfg.Servers) > 0:
		c.Servers = func() []netip.AddrPort { return n.cfg.Servers }
	default:
		follower := resolvconf.NewFollower(resolvconf.Path, n.cfg.Log)
		n.serving.Go(func() {
			if err := follower.Run(ctx); err != nil {
				n.cfg.Log.Error("changes of the host's resolvers are not seen", "error", err)
			}
		})
		c.Servers = follower.Servers
	}
	resolver := dns.New(c)
	for i := range s.udp {
		n.serving.Go(func() {
			if err := resolver.Serve(ctx, s.udp[i], s.tcp[i]); err != nil {
				n.cfg.Log.Error("the resolver has stopped", "error", err)
			}
		})
	}
}
