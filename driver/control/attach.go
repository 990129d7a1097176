package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/internal/netns"
)

// NetworkSpec is a network as an engine describes it.
type NetworkSpec struct {
	ID       string `json:"id"`
	Name     string `json:"name,omitempty"`
	Internal bool   `json:"internal,omitempty"`
	Foreign  bool   `json:"foreign,omitempty"` // somebody else's; see usernet.Foreign
	// Unaddressed: the containers get their addresses from elsewhere.
	Unaddressed bool              `json:"unaddressed,omitempty"`
	IPv6        bool              `json:"ipv6,omitempty"`
	Subnets     []Subnet          `json:"subnets,omitempty"`
	Options     map[string]string `json:"options,omitempty"`
}

// PrepareRequest is the body of POST /v1/networks/prepare. The answer is the NetworkSpec with what was left open: the
// subnets, and the options that the daemon's defaults give.
type PrepareRequest struct {
	Network NetworkSpec    `json:"network"`
	Taken   []netip.Prefix `json:"taken,omitempty"` // subnets of networks that the daemon may not know
}

// AttachRequest is the body of POST /v1/endpoints. The container's network namespace is the descriptor that comes with
// it.
type AttachRequest struct {
	Network NetworkSpec `json:"network"`
	// Prepare says that nobody has prepared the network. What it leaves open is the daemon's to choose; one of that ID that
	// is there already is taken as it is, unless it has another value for an option that is given.
	Prepare   bool             `json:"prepare,omitempty"`
	ID        string           `json:"id"` // the endpoint's
	Container driver.Container `json:"container"`
	Interface string           `json:"interface"`         // its name in the container
	Sandbox   string           `json:"sandbox,omitempty"` // on a foreign network: the path of the container's namespace
	Addresses []netip.Addr     `json:"addresses,omitempty"`
	MAC       string           `json:"mac,omitempty"`
	Metric    int              `json:"metric,omitempty"`     // of the default routes
	NoDefault bool             `json:"no_default,omitempty"` // no default routes
	Routes    []Route          `json:"routes,omitempty"`
	Ports     []Port           `json:"ports,omitempty"`
	Limits    driver.Limits    `json:"limits,omitzero"`
	Names     bool             `json:"names,omitempty"`    // names are to be resolved on the network
	Domains   []string         `json:"domains,omitempty"`  // that names are in as well
	Upstream  []netip.Addr     `json:"upstream,omitempty"` // DNS servers for other names; none: the host's
}

// Route is a route of a container. Without a next hop, Type says what becomes of packets.
type Route struct {
	Destination netip.Prefix `json:"destination"`
	NextHop     netip.Addr   `json:"next_hop,omitzero"`
	Metric      int          `json:"metric,omitempty"`
	Type        string       `json:"type,omitempty"` // blackhole, unreachable, prohibit; "" is unicast
}

// Attached is the answer: what the container has.
type Attached struct {
	MAC       string       `json:"mac"`
	MTU       int          `json:"mtu"`
	Bridge    string       `json:"bridge,omitempty"` // on a network of mode bridge: the link in the host's namespace
	Link      string       `json:"link,omitempty"`   // likewise: the end on it
	Addresses []Address    `json:"addresses"`
	DNS       []netip.Addr `json:"dns,omitempty"`
	Search    []string     `json:"search,omitempty"`
}

// Address is an address of a container with its subnet's mask and gateway.
type Address struct {
	Address netip.Prefix `json:"address"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
}

// PrepareNetwork checks a network before an engine writes it down and fills in what it leaves open.
func (c *Client) PrepareNetwork(ctx context.Context, req PrepareRequest) (NetworkSpec, error) {
	var spec NetworkSpec
	return spec, c.call(ctx, http.MethodPost, "networks/prepare", req, &spec)
}

// Attach puts a container on a network, which the daemon makes if it does not have it. netns is the container's
// namespace.
func (c *Client) Attach(ctx context.Context, req AttachRequest, netns *os.File) (Attached, error) {
	var got Attached
	return got, c.passing(netns).call(ctx, http.MethodPost, "endpoints", req, &got)
}

// Detach takes a container off a network. netns may be nil: it is gone. What the daemon does not know is gone already.
func (c *Client) Detach(ctx context.Context, networkID, endpointID string, netns *os.File) error {
	path := "networks/" + url.PathEscape(networkID) + "/endpoints/" + url.PathEscape(endpointID)
	return c.passing(netns).call(ctx, http.MethodDelete, path, nil, nil)
}

func prepare(d *driver.Driver, defaults map[string]string) doer[PrepareRequest, NetworkSpec] {
	return func(ctx context.Context, _ vars, req PrepareRequest) (NetworkSpec, error) {
		spec := req.Network
		options, err := config.Merge(defaults, spec.Options)
		if err != nil {
			return NetworkSpec{}, err
		}
		spec.Options = options
		n, err := spec.value()
		if err != nil {
			return NetworkSpec{}, err
		}
		if n, err = d.PrepareNetwork(ctx, n, req.Taken); err != nil {
			return NetworkSpec{}, err
		}
		spec.IPv6, spec.Subnets = n.IPv6, nil
		for _, s := range n.Subnets {
			spec.Subnets = append(spec.Subnets, subnetOf(s))
		}
		return spec, nil
	}
}

func attach(d *driver.Driver, defaults map[string]string) doer[AttachRequest, Attached] {
	return func(ctx context.Context, _ vars, req AttachRequest) (Attached, error) {
		ns, err := namespace(ctx)
		if err != nil {
			return Attached{}, err
		}
		if ns == nil {
			return Attached{}, fmt.Errorf("%w: no network namespace came with the request", usernet.ErrInvalid)
		}
		defer ns.Close()
		want, err := req.value()
		if err != nil {
			return Attached{}, err
		}
		want.Netns = ns
		got, err := driver.Attached{}, error(nil)
		for range 3 { // somebody else may be making that network, or taking it away
			if req.Prepare {
				if want.Network, err = req.Network.prepared(ctx, d, defaults); err != nil {
					return Attached{}, err
				}
			}
			got, err = d.Attach(context.WithoutCancel(ctx), want)
			if !req.Prepare || !errors.Is(err, usernet.ErrExists) {
				break
			}
		}
		if err != nil {
			return Attached{}, err
		}
		res := Attached{MAC: got.Endpoint.MAC.String(), MTU: want.Network.MTU(), DNS: got.DNS, Search: got.Search}
		if want.Network.Options.Mode == usernet.Bridge {
			res.Bridge, res.Link = want.Network.BridgeName(), got.Endpoint.HostName()
		}
		for i, a := range got.Addresses {
			res.Addresses = append(res.Addresses, Address{a, got.Gateways[i]})
		}
		return res, nil
	}
}

func detach(d *driver.Driver) doer[none, none] {
	return func(ctx context.Context, v vars, _ none) (none, error) {
		ns, err := namespace(ctx)
		if err != nil {
			return none{}, err
		}
		if ns != nil {
			defer ns.Close()
		}
		return none{}, d.Detach(context.WithoutCancel(ctx), v["id"], v["endpoint"], ns)
	}
}

// namespace is the network namespace that came with a request; nil: none did.
func namespace(ctx context.Context) (*netns.NS, error) {
	f := passed(ctx)
	if f == nil {
		return nil, nil
	}
	return netns.From(f)
}

// An ID becomes part of link and file names.
var validID = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z_.-]{0,127}$`)

func (s NetworkSpec) value() (usernet.Network, error) {
	n := usernet.Network{ID: s.ID, Internal: s.Internal, Unaddressed: s.Unaddressed, IPv6: s.IPv6}
	if !validID.MatchString(s.ID) {
		return n, invalid("network ID %.64q: want letters and digits", s.ID)
	}
	for _, sub := range s.Subnets {
		if sub.Subnet.IsValid() && sub.Subnet.Addr().Is6() {
			n.IPv6 = true
		}
		n.Subnets = append(n.Subnets, sub.value())
	}
	var err error
	if n.Options, err = config.Options(s.Options); err != nil {
		return n, err
	}
	if s.Foreign {
		n.Options.Mode, n.Unaddressed = usernet.Foreign, true
	}
	if s.Unaddressed && (n.Options.Mode == usernet.Usermode || len(n.Subnets)+len(n.Options.Subnets) > 0) {
		return n, invalid("network %.12s: without addresses it needs mode=bridge and no subnets", s.ID)
	}
	own := n.Options.Subnets
	n.Options.Subnets = nil
	switch {
	case len(own) == 0:
	case len(n.Subnets) == 0:
		n.Subnets = own
	case !sameSubnets(own, n.Subnets):
		return n, invalid("option subnet: the engine chose %s", n.Subnets[0].Prefix)
	}
	return n, config.Network(n)
}

// prepared is the network for an engine that prepares none: the one that is there if it is what s asks for, else as s
// describes it, with what s leaves open filled in.
func (s NetworkSpec) prepared(ctx context.Context, d *driver.Driver, defaults map[string]string) (usernet.Network, error) {
	have, err := d.FindNetwork(ctx, s.ID)
	if err == nil && have.ID == s.ID && (have.Internal || !s.Internal) && (have.IPv6 || !s.IPv6) && s.sameKind(have) && s.within(have.Subnets) && config.Agrees(have, s.Options) {
		return have, nil
	}
	if s.Options, err = config.Merge(defaults, s.Options); err != nil {
		return usernet.Network{}, err
	}
	n, err := s.value()
	if err != nil {
		return n, err
	}
	return d.PrepareNetwork(ctx, n, nil)
}

func (s NetworkSpec) sameKind(have usernet.Network) bool {
	return s.Foreign == (have.Options.Mode == usernet.Foreign) && (s.Foreign || s.Unaddressed) == have.Unaddressed
}

// within tells whether all the subnets are in have.
func (s NetworkSpec) within(have []usernet.Subnet) bool {
	for _, sub := range s.Subnets {
		if !slices.ContainsFunc(have, func(h usernet.Subnet) bool { return subnetOf(h) == subnetOf(sub.value()) }) {
			return false
		}
	}
	return true
}

func (s Subnet) value() usernet.Subnet {
	return usernet.Subnet{Prefix: s.Subnet.Masked(), Gateway: s.Gateway, First: s.First, Last: s.Last}
}

func sameSubnets(a, b []usernet.Subnet) bool {
	return slices.EqualFunc(a, b, func(x, y usernet.Subnet) bool { return x.Prefix == y.Prefix })
}

func (r AttachRequest) value() (driver.Attachment, error) {
	want := driver.Attachment{
		NetworkName: r.Network.Name, Sandbox: r.Sandbox, Container: r.Container, Addresses: r.Addresses,
		Metric: r.Metric, NoDefault: r.NoDefault, Names: r.Names, Domains: r.Domains, Upstream: r.Upstream,
		Endpoint: usernet.Endpoint{ID: r.ID, IfName: r.Interface},
	}
	if !validID.MatchString(r.ID) {
		return want, invalid("endpoint ID %.64q: want letters and digits", r.ID)
	}
	if err := config.LinkName(r.Interface); err != nil {
		return want, err
	}
	if r.Network.Foreign && (!filepath.IsAbs(r.Sandbox) || len(r.Addresses) == 0) {
		return want, invalid("foreign network %.12s: a container needs an address and the path of its namespace", r.Network.ID)
	}
	if !r.Prepare {
		n, err := r.Network.value()
		if err != nil {
			return want, err
		}
		want.Network = n
	}
	if r.MAC != "" {
		mac, err := net.ParseMAC(r.MAC)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 || slices.Equal(mac, make([]byte, 6)) {
			return want, invalid("MAC address %.64q: want the six bytes of one station", r.MAC)
		}
		want.Endpoint.MAC = mac
	}
	for _, a := range r.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || a.Zone() != "" {
			return want, invalid("address %q: not an interface's", a)
		}
	}
	for _, w := range r.Routes {
		route, err := w.value()
		if err != nil {
			return want, err
		}
		want.Routes = append(want.Routes, route)
	}
	want.Ports = portValues(r.Ports)
	for _, rate := range []driver.Rate{r.Limits.In, r.Limits.Out} {
		if rate.Bits < driver.MinRate && rate != (driver.Rate{}) {
			return want, invalid("limit of %d bits per second: want at least %d", rate.Bits, driver.MinRate)
		}
	}
	want.Limits = r.Limits
	return want, nil
}

var routeKinds = map[string]int{
	"": 0, "unicast": 0, "blackhole": unix.RTN_BLACKHOLE, "unreachable": unix.RTN_UNREACHABLE, "prohibit": unix.RTN_PROHIBIT,
}

func (w Route) value() (driver.Route, error) {
	kind, known := routeKinds[w.Type]
	r := driver.Route{Destination: w.Destination, NextHop: w.NextHop, Metric: w.Metric, Kind: kind}
	switch {
	case !known:
		return r, invalid("route to %s: type %.64q: want unicast, blackhole, unreachable or prohibit", w.Destination, w.Type)
	case !w.Destination.IsValid():
		return r, invalid("route without a destination")
	case kind == 0 && (!w.NextHop.IsValid() || w.NextHop.Is4() != w.Destination.Addr().Is4()):
		return r, invalid("route to %s: want a gateway of the same family", w.Destination)
	case kind != 0 && w.NextHop.IsValid():
		return r, invalid("route to %s: a %s route has no gateway", w.Destination, w.Type)
	case w.Metric < 0:
		return r, invalid("route to %s: metric %d", w.Destination, w.Metric)
	}
	return r, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w "+format, append([]any{usernet.ErrInvalid}, args...)...)
}
