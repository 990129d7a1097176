package gateway

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/driver/gvproxy/cli"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/usermode/vmnet"
	"github.com/usernet/usernet/vsock"
)

// Config is what a Gateway is made of.
type Config struct {
	Network    vmnet.Config      // its Log is set by New, and its Search if SearchHost is
	SearchHost bool              // machines look for names in the host's domains
	Zones      []gvproxy.Zone    // that are answered here, before the host's resolvers are asked
	Forwards   []gvproxy.Forward // made at the start; the API shows them and can end them
	Sockets    []gvproxy.Forward // likewise, but the API does not know them

	Listen   []vsock.Addr // the whole API, for programs of the host, and where machines connect
	Machines []vsock.Addr // where machines connect, and publish their ports; nothing else
	Services []vsock.Addr // the API without what machines connect by
	Profile  bool         // Go's profiler is on Listen

	Hypervisors Hypervisors

	Capture string // a file for all frames, in pcap; "": none
	PIDFile string // a file for the number of the process, in decimal and without a newline; "": none
	Notify  string // the path of the socket where a program waits for notifications; "": none
	Log     *slog.Logger
}

// Hypervisors are the sockets that hypervisors connect to, or send to, without HTTP.
type Hypervisors struct {
	VPNKit    []vsock.Addr // HyperKit, which begins with a handshake
	QEMU      []vsock.Addr // -netdev stream, -netdev socket
	Packets   []string     // paths of SOCK_SEQPACKET sockets, as BESS's
	Datagrams []string     // paths of SOCK_DGRAM sockets, one machine at a time on each: vfkit, krunkit, -netdev dgram

	// In and Out are a machine's wire in HyperKit's framing without its handshake; when it ends, so does Run. nil: none.
	In, Out *os.File

	VPNKitMACs map[string]l2.MAC // by the UUID of a HyperKit machine, in lower case: what address it is told to take

	// Linger is how long Run goes on after the last machine of QEMU, Packets and Datagrams has left; 0: for ever. gvproxy ends at once.
	Linger time.Duration
}

// The IPv6 side of a network that nobody has said anything else about.
var (
	Subnet6 = netip.MustParsePrefix("fd75:6e65:74:7f::/64")

	gateway6 = netip.MustParseAddr("::1") // within the subnet
	host6    = netip.MustParseAddr("::fe")
)

// lingerGvproxy is how long a gateway under the name gvproxy waits for its machine to come back: long enough for a hypervisor that
// reconnects, short enough for podman machine, which starts another gvproxy for the machine's next start and counts on the
// ports being free.
const lingerGvproxy = 5 * time.Second

// FromGvproxy makes the configuration that a command line of gvproxy asks for, with IPv6 in Subnet6.
func FromGvproxy(g cli.Gvproxy) Config {
	n := g.Network
	c := Config{
		Network: vmnet.Config{
			MTU: n.MTU, MAC: l2.MAC(n.GatewayMAC), Subnet: n.Subnet, Gateway: n.Gateway,
			VirtualIPs: n.VirtualIPs, NAT: maps.Clone(n.NAT), LinkLocal: n.EC2Metadata, Search: n.Search,
			Leases: make(map[netip.Addr]l2.MAC, len(n.Leases)),
		},
		SearchHost: n.SearchHost, Zones: n.Zones, Forwards: n.Forwards, Sockets: g.Sockets,
		Listen: g.Listen, Profile: g.LogLevel <= slog.LevelDebug,
		Hypervisors: Hypervisors{VPNKitMACs: make(map[string]l2.MAC, len(n.VPNKitMACs)), Linger: lingerGvproxy},
		Capture:     n.Capture, PIDFile: g.PIDFile, Notify: g.Notify,
	}
	for a, mac := range n.Leases {
		c.Network.Leases[a] = l2.MAC(mac)
	}
	for uuid, mac := range n.VPNKitMACs {
		c.Hypervisors.VPNKitMACs[uuid] = l2.MAC(mac)
	}
	c.SetSubnet6(Subnet6)
	if g.Services != (vsock.Addr{}) {
		c.Services = []vsock.Addr{g.Services}
	}
	c.Hypervisors.set(g.Hypervisors)
	return c
}

// set takes over the sockets of gvproxy's command line.
func (h *Hypervisors) set(g cli.Hypervisors) {
	if g.VPNKit != (vsock.Addr{}) {
		h.VPNKit = []vsock.Addr{g.VPNKit}
	}
	if g.QEMU != (vsock.Addr{}) {
		h.QEMU = []vsock.Addr{g.QEMU}
	}
	if g.BESS != "" {
		h.Packets = []string{g.BESS}
	}
	if g.VFKit != "" {
		h.Datagrams = []string{g.VFKit}
	}
	if g.Stdio {
		h.In, h.Out = os.Stdin, os.Stdout
	}
}

// SetSubnet6 gives the network another IPv6 subnet of 64 bits, or none for the zero value. The gateway is its first address, and
// the one that ends in fe stands for the host, ::1.
func (c *Config) SetSubnet6(p netip.Prefix) {
	n := &c.Network
	for from := range n.NAT {
		if from == within(n.Subnet6, host6) {
			delete(n.NAT, from)
		}
	}
	n.Subnet6, n.Gateway6 = p, netip.Addr{}
	if p.IsValid() {
		n.Gateway6 = within(p, gateway6)
		if n.NAT == nil {
			n.NAT = make(map[netip.Addr]netip.Addr)
		}
		n.NAT[within(p, host6)] = netip.IPv6Loopback()
	}
}

// within is the address of a /64 with the lower half of host.
func within(p netip.Prefix, host netip.Addr) netip.Addr {
	if !p.IsValid() {
		return netip.Addr{}
	}
	a, h := p.Addr().As16(), host.As16()
	copy(a[8:], h[8:])
	return netip.AddrFrom16(a)
}

// Reachable tells whether there is any way for machines to come.
func (c *Config) Reachable() bool {
	h := &c.Hypervisors
	return len(c.Listen)+len(c.Machines)+len(h.VPNKit)+len(h.QEMU)+len(h.Packets)+len(h.Datagrams) > 0 || h.In != nil
}

func (c *Config) check() error {
	if (c.Hypervisors.In == nil) != (c.Hypervisors.Out == nil) {
		return fmt.Errorf("%w wire of two files: one is missing", usernet.ErrInvalid)
	}
	if p := c.Network.Subnet6; p.IsValid() && (p.Bits() != 64 || !p.Addr().Is6()) {
		return fmt.Errorf("%w IPv6 subnet %s: want a /64", usernet.ErrInvalid, p)
	}
	if c.Log == nil {
		return errors.New("there is no log")
	}
	return nil
}
