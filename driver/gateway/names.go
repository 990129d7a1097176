package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/driver/gvproxy"
)

// dnsPort is where the gateway answers DNS, by UDP and TCP.
const dnsPort = 53

// names are the zones that the gateway answers for itself. They are kept twice: the API shows them as they were given, and dns
// knows them in the form in which names are compared.
type names struct {
	answered dns.Zones

	mu    sync.Mutex
	zones []gvproxy.Zone // never changed, but replaced
}

func newNames(zones []gvproxy.Zone) *names {
	n := &names{}
	if zones != nil { // The API shows the difference.
		n.zones = []gvproxy.Zone{}
	}
	for _, z := range zones {
		n.add(z)
	}
	return n
}

func (n *names) all() []gvproxy.Zone {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.zones
}

func (n *names) add(z gvproxy.Zone) {
	add := dns.Zone{Name: z.Name, DefaultIP: z.Default}
	for _, r := range z.Records {
		add.Records = append(add.Records, dns.ZoneRecord{Name: r.Name, Regexp: r.Pattern, IP: r.Addr})
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.zones = gvproxy.Merge(n.zones, z)
	n.answered.Add(add)
}

// serveNames listens for DNS in the network.
func (g *Gateway) serveNames() (service, error) {
	udp, err := g.net.ListenUDP(dnsPort)
	if err != nil {
		return service{}, fmt.Errorf("listen in the network: %w", err)
	}
	tcp, err := g.net.ListenTCP(dnsPort)
	if err != nil {
		return service{}, errors.Join(fmt.Errorf("listen in the network: %w", err), udp.Close())
	}
	resolver := dns.New(dns.Config{Sources: []dns.Source{&g.names.answered}, Servers: g.upstream.Servers, Log: g.log})
	return service{
		run:   func(ctx context.Context) error { return resolver.Serve(ctx, udp, tcp) },
		close: func() error { return errors.Join(udp.Close(), tcp.Close()) },
	}, nil
}
