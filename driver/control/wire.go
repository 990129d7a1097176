// Package control is the door for usernet's own commands: HTTP with JSON over the control socket, and the client for
// it. It is not an interface for engines.
package control

import (
	"errors"
	"net/netip"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver"
)

// Network is one network in the answer to GET /v1/networks, and in usernet ps --json.
type Network struct {
	ID        string       `json:"id"`
	Name      string       `json:"name,omitempty"` // the engine's, if it told
	Mode      usernet.Mode `json:"mode"`
	Up        bool         `json:"up"`                   // false: it could not be brought back after a restart
	Bridge    string       `json:"bridge,omitempty"`     // the link in the host's namespace, on networks of mode bridge
	Path      string       `json:"path,omitempty"`       // how TCP leaves a usermode network: splice or netstack
	PathError string       `json:"path_error,omitempty"` // why it is netstack although the fast path was wanted
	DNS       []netip.Addr `json:"dns,omitempty"`        // where containers ask for names, if that is not the engine's business
	DNSError  string       `json:"dns_error,omitempty"`  // why they cannot, at all addresses or some
	MTU       int          `json:"mtu"`
	Internal  bool         `json:"internal,omitempty"`
	Subnets   []Subnet     `json:"subnets"`
	Traffic   *Traffic     `json:"traffic,omitempty"` // of a usermode network
	Endpoints []Endpoint   `json:"endpoints"`
}

// Traffic is what a usermode network carries out at the moment, and what it has turned away since it is up.
type Traffic struct {
	Conns   int    `json:"tcp_connections"`
	Pending int    `json:"tcp_pending"` // being made
	Flows   int64  `json:"udp_flows"`
	Refused uint64 `json:"tcp_refused"`       // beyond a container's limit or everybody's
	Ignored uint64 `json:"tcp_ignored"`       // likewise while being made: their senders repeat them
	Evicted uint64 `json:"udp_evicted"`       // flows that made room for others
	Dropped uint64 `json:"datagrams_dropped"` // broken, or not taken by the host
	Lost    uint64 `json:"packets_lost"`      // to containers
}

// Subnet is an address range of a network.
type Subnet struct {
	Subnet  netip.Prefix `json:"subnet"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
	First   netip.Addr   `json:"first,omitzero"` // of the addresses that are given to endpoints; none: the subnet's
	Last    netip.Addr   `json:"last,omitzero"`  // likewise
}

// Endpoint is a container's place on a network.
type Endpoint struct {
	ID string `json:"id"`

	Container   string       `json:"container,omitempty"`    // its name, if the engine told
	ContainerID string       `json:"container_id,omitempty"` // likewise
	Aliases     []string     `json:"aliases,omitempty"`      // its further names on this network
	Interface   string       `json:"interface,omitempty"`    // its name in the container, likewise
	IPv4        netip.Prefix `json:"ipv4,omitzero"`
	IPv6        netip.Prefix `json:"ipv6,omitzero"`
	MAC         string       `json:"mac"`
	Joined      bool         `json:"joined"` // a container has it
	Ports       []Port       `json:"ports"`
}

// Port is a published port. No host IP means all addresses of the host.
type Port struct {
	Proto         usernet.Proto `json:"proto"`
	HostIP        netip.Addr    `json:"host_ip,omitzero"`
	HostPort      uint16        `json:"host_port"`
	HostPortEnd   uint16        `json:"host_port_end,omitempty"` // in requests: the first free port up to this one
	ContainerPort uint16        `json:"container_port"`
	Held          bool          `json:"held,omitempty"`  // the engine has bound the host port; its clients are redirected
	Error         string        `json:"error,omitempty"` // why nothing is served there at the moment
	Gateway       GatewayState  `json:"gateway,omitempty"`
	GatewayError  string        `json:"gateway_error,omitempty"` // why it is lost
}

// GatewayState tells whether a port of a virtual machine is published on the machine's host as well; "": that is not wanted.
type GatewayState string

// The states of a port that is wanted on the host: one that is lost comes back when it can be had.
const (
	GatewayUp   GatewayState = "up"
	GatewayLost GatewayState = "lost"
)

func networkOf(s driver.NetworkStatus) Network {
	n := Network{ID: s.ID, Name: s.Name, Mode: s.Options.Mode, Up: s.Up, MTU: s.MTU(), Internal: s.Internal, Path: s.Path, PathError: s.PathError, DNS: s.Resolver, DNSError: s.ResolverError, Subnets: []Subnet{}, Endpoints: []Endpoint{}}
	if n.Mode == usernet.Bridge {
		n.Bridge = s.BridgeName()
	}
	if n.Mode == usernet.Usermode && n.Up && !n.Internal {
		t := Traffic(s.Traffic)
		n.Traffic = &t
	}
	for _, sub := range s.Subnets {
		n.Subnets = append(n.Subnets, subnetOf(sub))
	}
	for _, es := range s.Endpoints {
		e := Endpoint{ID: es.ID, Container: es.Container.Name, ContainerID: es.Container.ID, Aliases: es.Container.Aliases, Interface: es.IfName, IPv4: es.Addr4, IPv6: es.Addr6, MAC: es.MAC.String(), Joined: es.Joined, Ports: []Port{}}
		for _, p := range es.Ports {
			wire := PortOf(p.Port)
			wire.Error = p.Err
			if p.Beyond {
				wire.Gateway, wire.GatewayError = GatewayUp, p.BeyondErr
				if p.BeyondErr != "" {
					wire.Gateway = GatewayLost
				}
			}
			e.Ports = append(e.Ports, wire)
		}
		n.Endpoints = append(n.Endpoints, e)
	}
	return n
}

// subnetOf is a subnet on the wire.
func subnetOf(s usernet.Subnet) Subnet {
	return Subnet{Subnet: s.Prefix, Gateway: s.Gateway, First: s.First, Last: s.Last}
}

// PortOf is a port on the wire.
func PortOf(p usernet.Port) Port {
	w := Port{Proto: p.Proto, HostIP: p.HostIP, HostPort: p.HostPort, ContainerPort: p.ContainerPort, Held: p.Held}
	if p.HostPortEnd > p.HostPort {
		w.HostPortEnd = p.HostPortEnd
	}
	return w
}

// Value is the port that w stands for.
func (w Port) Value() usernet.Port {
	return usernet.Port{Proto: w.Proto, HostIP: w.HostIP, HostPort: w.HostPort, HostPortEnd: max(w.HostPort, w.HostPortEnd), ContainerPort: w.ContainerPort, Held: w.Held}
}

func portsOf(ps []usernet.Port) []Port {
	ws := make([]Port, 0, len(ps))
	for _, p := range ps {
		ws = append(ws, PortOf(p))
	}
	return ws
}

func portValues(ws []Port) []usernet.Port {
	var ps []usernet.Port
	for _, w := range ws {
		ps = append(ps, w.Value())
	}
	return ps
}

// portsBody is the body of requests and answers about an endpoint's ports.
type portsBody struct {
	Ports []Port `json:"ports"`
}

// errorBody is the answer to a request that failed.
type errorBody struct {
	Error string `json:"error"`
	Kind  string `json:"kind,omitempty"` // see kinds
}

// kinds are the errors of the daemon that its clients can tell from others, by their names on the wire.
var kinds = map[string]error{
	"not found":    usernet.ErrNotFound,
	"exists":       usernet.ErrExists,
	"invalid":      usernet.ErrInvalid,
	"port taken":   usernet.ErrPortTaken,
	"shuts down":   driver.ErrClosed,
	"no addresses": driver.ErrExhausted,
}

func kindOf(err error) string {
	for name, kind := range kinds {
		if errors.Is(err, kind) {
			return name
		}
	}
	return ""
}

// refusal is an error of the daemon at its client.
type refusal struct {
	text string
	kind error // nil: none of kinds
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.kind }
