// Package usernet holds the nouns that every part of usernet speaks: a Network, an Endpoint on it, the Ports it
// publishes. They are plain values that were checked where they entered; nothing here does I/O, and nothing here
// imports another package of the project.
package usernet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// The errors that a door turns into an answer of its protocol. They are wrapped with what they are about.
var (
	// ErrNotFound says that a network, an endpoint or a port is not known. Teardown calls treat it as success.
	ErrNotFound = errors.New("not found")
	// ErrExists says that the ID, the name or the address is taken already by something else.
	ErrExists = errors.New("already exists")
	// ErrInvalid says that the request can never succeed as it stands.
	ErrInvalid = errors.New("invalid")
	// ErrPortTaken says that somebody else, or another endpoint, holds the host port.
	ErrPortTaken = errors.New("port is already allocated")
)

// Mode is the kind of a network.
type Mode string

const (
	// Usermode networks reach the world through sockets of the usernet process; the host is not changed.
	Usermode Mode = "usermode"
	// Bridge networks are routed by the host's kernel: bridge, veth, masquerade, DNAT.
	Bridge Mode = "bridge"
	// Foreign networks are somebody else's, and so are the interfaces of the containers on them: usernet publishes ports of
	// theirs and that is all. No user can ask for one.
	Foreign Mode = "foreign"
)

// Subnet is one address range of a network.
type Subnet struct {
	Prefix   netip.Prefix // masked
	Gateway  netip.Addr   // the network's own address in Prefix; zero: it has none
	Reserved []netip.Addr // addresses that must never be given to an endpoint
	First    netip.Addr   // endpoints that bring no address get one from here on; zero: from the beginning
	Last     netip.Addr   // to here; zero: to the end
}

// Options are what a user chooses for a network, after config has checked it.
type Options struct {
	Mode Mode
	MTU  int // bytes; 0 means 1500

	ICC           bool       // endpoints of the network may talk to each other
	FastPath      bool       // Usermode: splice TCP connections out of the network in the kernel, where it can
	Masquerade    bool       // Bridge: outgoing traffic takes the host's address
	BridgeName    string     // Bridge: the link's name; "" means one made from the network's ID
	HostBinding   netip.Addr // the host address that published ports listen on when none is given; zero: all
	Source4       netip.Addr // Bridge: the host address outgoing IPv4 traffic takes; zero: the kernel's choice
	Source6       netip.Addr // likewise for IPv6
	IfacePrefix   string     // the name of a container's interface without its number; "" means eth
	InhibitHostIP bool       // Bridge: leave the gateway address off the bridge
	Subnets       []Subnet   // used where the engine brought no addresses (null IPAM)
}

// Network is one network as it was asked for.
type Network struct {
	ID       string // the engine's ID, 64 hex digits from Docker
	Internal bool   // no way out of the network and none in
	// Unaddressed networks have no subnets: their containers get addresses from elsewhere.
	Unaddressed bool
	IPv6        bool // the engine enabled IPv6 on it
	Subnets     []Subnet
	Options     Options
}

// MTU is the number of bytes an IP packet on the network may have.
func (n Network) MTU() int {
	if n.Options.MTU == 0 {
		return 1500
	}
	return n.Options.MTU
}

// BridgeName is the name of the network's bridge in the host's namespace; it fits in IFNAMSIZ.
func (n Network) BridgeName() string {
	if n.Options.BridgeName != "" {
		return n.Options.BridgeName
	}
	return "unb" + short(n.ID, 12)
}

// SubnetOf returns the subnet that contains a.
func (n Network) SubnetOf(a netip.Addr) (Subnet, bool) {
	for _, s := range n.Subnets {
		if s.Prefix.Contains(a) {
			return s, true
		}
	}
	return Subnet{}, false
}

// Endpoint is one container's place on a network.
type Endpoint struct {
	ID        string
	NetworkID string
	Addr4     netip.Prefix // with the subnet's mask; zero: no IPv4
	Addr6     netip.Prefix // likewise
	MAC       net.HardwareAddr
	IfName    string // the interface's name in the container; "" lets the engine number them
}

// HostName is the name of the endpoint's host end: the end that stays on the bridge.
func (e Endpoint) HostName() string { return "un" + short(e.ID, 12) }

// PeerName is the name of the container's end before the engine moves and renames it.
func (e Endpoint) PeerName() string { return "uc" + short(e.ID, 12) }

// Attachment is what an engine needs to put an endpoint's interface into a container.
type Attachment struct {
	SrcName   string     // the link as it is now, in the engine's namespace
	DstPrefix string     // the engine renames it to this and a number: eth0
	DstName   string     // or to exactly this; "" leaves it to DstPrefix
	Gateway4  netip.Addr // the container's default route; zero: none through this network
	Gateway6  netip.Addr // likewise for IPv6
	Routes    []Route    // further routes of the container
}

// Route is a route of a container.
type Route struct {
	Destination netip.Prefix
	NextHop     netip.Addr // zero: the destination is on the link
}

func short(id string, n int) string {
	if len(id) > n {
		return id[:n]
	}
	return id
}

// Proto is a transport protocol whose ports can be published.
type Proto string

// The protocols. SCTP is published on Bridge networks only.
const (
	TCP  Proto = "tcp"
	UDP  Proto = "udp"
	SCTP Proto = "sctp"
)

// Port is a wish to publish a port of a container on the host, and, once HostPort is set and HostPortEnd is 0 or
// equal to it, the fact that it is.
type Port struct {
	Proto         Proto
	HostIP        netip.Addr // zero: all addresses of the host, of both families
	HostPort      uint16     // 0: any free port
	HostPortEnd   uint16     // the last port of the range to choose the first free one from; 0 means HostPort
	ContainerPort uint16
	IPv4Only      bool // HostIP zero: only the host's IPv4 addresses, another network serves the IPv6 ones
	Held          bool // whoever asks for it has bound the host port already: its clients are redirected to us
}

// String writes a port as the argument of docker run -p that asks for it: 127.0.0.1:8080:80/tcp.
func (p Port) String() string {
	var b strings.Builder
	switch {
	case p.HostIP.Is6():
		fmt.Fprintf(&b, "[%s]:", p.HostIP)
	case p.HostIP.IsValid():
		fmt.Fprintf(&b, "%s:", p.HostIP)
	}
	if p.HostPort != 0 || p.HostIP.IsValid() {
		if p.HostPort != 0 {
			b.WriteString(strconv.Itoa(int(p.HostPort)))
		}
		if p.HostPortEnd > p.HostPort {
			fmt.Fprintf(&b, "-%d", p.HostPortEnd)
		}
		b.WriteByte(':')
	}
	fmt.Fprintf(&b, "%d/%s", p.ContainerPort, p.Proto)
	return b.String()
}
