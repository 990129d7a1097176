package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/firewall"
	"github.com/usernet/usernet/internal/redirect"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/portmap"
	"github.com/usernet/usernet/usermode"
	"github.com/usernet/usernet/vsock/publish"
)

// published is one port of a container on the host. Its Port has the host port that was chosen.
type published struct {
	usernet.Port
	manual  bool               // asked for by AddPort, not by the engine
	forward *portmap.Forward   // nil while it could not be had again after a restart
	err     error              // why
	beyond  *publish.Published // the same port on the host of this machine; nil: there is no gateway to it
	steps   undo.List          // what to take back with it
}

// errElsewhere says that another endpoint of the same container serves the port. When that goes, this one takes over.
var errElsewhere = errors.New("published through another network of the container")

// Publish publishes the ports that the engine wants for an endpoint, in place of those it wanted before.
func (d *Driver) Publish(_ context.Context, networkID, id string, ports []usernet.Port) error {
	n, c, err := d.container(networkID, id)
	if err != nil {
		return err
	}
	defer n.mu.Unlock()
	if n.Internal {
		return nil // Docker 29 calls even for internal networks; nothing leads in there
	}
	c.gateway = true
	byEngine := func(p *published) bool { return !p.manual }
	if err := n.unpublish(c, byEngine); err != nil {
		return err
	}
	// What was released above must not come back with a restart, whether or not the new ports could be had.
	return errors.Join(n.publish(c, ports, false), n.save(c))
}

// Unpublish releases the ports that the engine wanted.
func (d *Driver) Unpublish(_ context.Context, networkID, id string) error {
	return d.teardown(networkID, id, func(n *network, c *container) error {
		c.gateway = false
		if err := n.unpublish(c, func(p *published) bool { return !p.manual }); err != nil {
			return err
		}
		return n.save(c)
	})
}

// AddPorts publishes more ports of a running container. It returns them with the host ports that were chosen.
func (d *Driver) AddPorts(_ context.Context, networkID, id string, ports []usernet.Port) ([]usernet.Port, error) {
	n, c, err := d.container(networkID, id)
	if err != nil {
		return nil, err
	}
	defer n.mu.Unlock()
	if n.Internal {
		return nil, fmt.Errorf("%w: network %.12s is internal, nothing can be published there", usernet.ErrInvalid, n.ID)
	}
	if !c.joined {
		return nil, fmt.Errorf("%w: no container is running on endpoint %.12s", usernet.ErrInvalid, id)
	}
	had := len(c.ports)
	if err := n.publish(c, ports, true); err != nil {
		return nil, err
	}
	var got []usernet.Port
	for _, p := range c.ports[had:] {
		got = append(got, p.Port)
	}
	return got, n.save(c)
}

// RemovePorts takes published ports of a container away, whoever asked for them. Every one of them must be there.
func (d *Driver) RemovePorts(_ context.Context, networkID, id string, ports []usernet.Port) error {
	n, c, err := d.container(networkID, id)
	if err != nil {
		return err
	}
	defer n.mu.Unlock()
	var drop []*published
	for _, want := range ports {
		i := slices.IndexFunc(c.ports, func(p *published) bool {
			return p.Proto == want.Proto && p.HostIP == want.HostIP && p.HostPort == want.HostPort && p.ContainerPort == want.ContainerPort
		})
		if i < 0 {
			return fmt.Errorf("endpoint %.12s does not publish %s: %w", id, want, usernet.ErrNotFound)
		}
		drop = append(drop, c.ports[i])
	}
	if err := n.unpublish(c, func(p *published) bool { return slices.Contains(drop, p) }); err != nil {
		return err
	}
	return n.save(c)
}

// publish adds ports to a container: all of them or none.
func (n *network) publish(c *container, ports []usernet.Port, manual bool) (err error) {
	if len(ports) == 0 {
		return nil
	}
	had := slices.Clone(c.ports)
	var steps undo.List
	defer func() {
		if err != nil {
			c.ports = had
			err = errors.Join(err, steps.Close(), n.declare(c))
		}
	}()
	for _, port := range ports {
		if !port.HostIP.IsValid() {
			port.HostIP = n.Options.HostBinding
		}
		if port.IPv4Only && !port.HostIP.IsValid() {
			port.HostIP = netip.IPv4Unspecified()
		}
		p := &published{Port: port, manual: manual}
		switch err := n.listen(c, p, n.driver.beyond); {
		case errors.Is(err, errElsewhere):
			p.err = err
		case err != nil:
			return err
		}
		steps.Push(p.close)
		c.ports = append(c.ports, p)
	}
	if err := n.declare(c); err != nil {
		return err
	}
	n.flushUDP(c.ports[len(had):])
	return nil
}

// listen takes the host port, or, where its asker has it, one that the host port's clients can be redirected to; and with it
// the one on the host of this machine, by way of ask.
func (n *network) listen(c *container, p *published, ask asker) (err error) {
	if p.Proto == usernet.SCTP && n.Options.Mode != usernet.Bridge {
		return fmt.Errorf("%w: %s: SCTP is published on networks of mode bridge only", usernet.ErrInvalid, p.Port)
	}
	release, ok := n.driver.claims.take(c, p.Port)
	if !ok {
		return errElsewhere
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	req := portmap.Request{
		Owner:  "endpoint " + shortID(c.ID),
		Port:   p.Port,
		Addr4:  c.Addr4.Addr(),
		Addr6:  c.Addr6.Addr(),
		Dialer: n.dialer(c),
	}
	if p.Held && p.Proto != usernet.SCTP {
		req.Port.HostPort, req.Port.HostPortEnd = 0, 0
	}
	f, beyond, err := n.driver.take(req, p.Port, ask)
	if err != nil {
		return err
	}
	p.forward, p.beyond, p.err = f, beyond, nil
	p.steps.Push(func() error { release(); return nil })
	p.steps.Push(f.Close)
	if beyond != nil {
		p.steps.Push(beyond.Close)
	}
	if !p.Held {
		p.Port = f.Port()
	}
	return nil
}

// declare tells the kernel what the host does with a container's ports, beside our listening on them.
func (n *network) declare(c *container) error {
	var held []redirect.Port
	for _, p := range c.ports {
		if !p.Held || p.forward == nil || p.Proto == usernet.SCTP {
			continue
		}
		at := []netip.Addr{p.HostIP}
		if !p.HostIP.IsValid() {
			at = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
		}
		for _, a := range at {
			held = append(held, redirect.Port{Proto: p.Proto, Addr: a, Port: p.HostPort, To: p.forward.Port().HostPort})
		}
	}
	if err := n.driver.redirects.Set("endpoint "+shortID(c.ID), held); err != nil {
		return err
	}
	return n.applyRules()
}

// unpublish releases the ports of a container that which picks.
func (n *network) unpublish(c *container, which func(*published) bool) error {
	var keep, drop []*published
	for _, p := range c.ports {
		if which(p) {
			drop = append(drop, p)
		} else {
			keep = append(keep, p)
		}
	}
	if len(drop) == 0 {
		return nil
	}
	var errs []error
	for _, p := range drop {
		errs = append(errs, p.close())
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.ports = keep
	if err := n.declare(c); err != nil {
		return err
	}
	n.flushUDP(drop)
	return nil
}

// close stops listening. It may be repeated.
func (p *published) close() error {
	if err := p.steps.Close(); err != nil {
		return err
	}
	p.forward, p.beyond = nil, nil
	return nil
}

// closeForwards stops listening for a container and keeps the ports in its row.
func (c *container) closeForwards() error {
	var errs []error
	for _, p := range c.ports {
		errs = append(errs, p.close())
	}
	return errors.Join(errs...)
}

// retryPorts takes the ports again that the table says are published and nobody listens on: all of them after a restart,
// later those that somebody else had taken in between.
func (n *network) retryPorts() {
	for _, c := range n.containers {
		var back []*published
		for _, p := range c.ports {
			if p.forward != nil || n.segment == nil {
				continue
			}
			if n.retry(c, p); p.forward != nil {
				back = append(back, p)
			}
		}
		if len(back) == 0 {
			continue
		}
		if err := n.declare(c); err != nil {
			n.driver.cfg.Log.Error("firewall is not up to date", "network", shortID(n.ID), "error", err)
		}
		n.flushUDP(back)
	}
}

// retry tries to take one port.
func (n *network) retry(c *container, p *published) {
	was := c.gateway
	// If it works now, the network that had the port is gone, and its default route with it.
	c.gateway = was || errors.Is(p.err, errElsewhere)
	err := n.listen(c, p, n.driver.keepBeyond)
	if err != nil {
		c.gateway = was
	}
	if err != nil && p.err == nil && !errors.Is(err, errElsewhere) {
		n.driver.cfg.Log.Error("published port is lost for now", "endpoint", shortID(c.ID), "port", p.Port.String(), "error", err)
	}
	p.err = err
}

// dialer reaches a container. On a usermode network it sees the client's own address, if its answers come back
// through the network.
func (n *network) dialer(c *container) portmap.Dialer {
	g := n.segment.Gateway()
	switch {
	case g == nil:
		return portmap.Host{}
	case c.gateway:
		return g
	case c.owner.ID != "":
		return datagramsFromGateway{g}
	}
	return fromGateway{g}
}

// datagramsFromGateway dials a container that was attached by us: what it sends from the address that we dial comes back
// through us whatever its default route. But a server that answers datagrams from a socket of all addresses takes the
// address of the way that leads to the client. To the gateway that is ours.
type datagramsFromGateway struct{ *usermode.Gateway }

func (f datagramsFromGateway) DialUDP(_, target netip.AddrPort) (fd int, err error) {
	return f.Gateway.DialUDP(netip.AddrPort{}, target)
}

// fromGateway dials a container whose default route leads elsewhere: it gets to see the gateway's address, which it
// can answer.
type fromGateway struct{ *usermode.Gateway }

func (f fromGateway) StartTCP(_, target netip.AddrPort) (fd int, err error) {
	return f.Gateway.StartTCP(netip.AddrPort{}, target)
}

func (f fromGateway) DialUDP(_, target netip.AddrPort) (fd int, err error) {
	return f.Gateway.DialUDP(netip.AddrPort{}, target)
}

// forwards is what the firewall does for a container's ports on a bridge network.
func (c *container) forwards(ports []*published) []firewall.Forward {
	var fs []firewall.Forward
	for _, p := range ports {
		if p.forward == nil {
			continue
		}
		for _, a := range []netip.Prefix{c.Addr4, c.Addr6} {
			if !a.IsValid() || p.HostIP.IsValid() && p.HostIP.Is4() != a.Addr().Is4() {
				continue
			}
			f := firewall.Forward{Proto: p.Proto, HostPort: p.HostPort, Target: netip.AddrPortFrom(a.Addr(), p.ContainerPort)}
			if !p.HostIP.IsUnspecified() {
				f.HostIP = p.HostIP
			}
			fs = append(fs, f)
		}
	}
	return fs
}
