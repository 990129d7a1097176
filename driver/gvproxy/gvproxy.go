// Package gvproxy is the door for programs that know gvproxy, the gateway of gvisor-tap-vsock: Podman in a machine and
// podman machine, Lima, CRC. It answers the HTTP API on gvproxy's sockets and inside the network (Full, Services,
// Inside), byte for byte where gvproxy's answer makes sense, and sends its notifications (Notifier). How gvproxy is called
// is read by driver/gvproxy/cli. The package carries no traffic: what the API asks for is done by a Gateway.
package gvproxy

import (
	"context"
	"net"
	"net/netip"
	"regexp"
	"slices"
)

// Gateway is the network that the API is about.
type Gateway interface {
	Forwarder
	Names
	Switch
	Streams
}

// Forwarder makes things of the network reachable on the host.
type Forwarder interface {
	// Forwards returns what is forwarded, in any order.
	Forwards() []Forward
	// Expose begins to forward. It fails with usernet.ErrExists if there is a forward of that key; the text of any other
	// error is shown to the client as it stands. The context is the request's and lasts 9 s.
	Expose(ctx context.Context, f Forward) error
	// Unexpose ends what Expose began. It fails with usernet.ErrNotFound if there is none of that key, or, when to is
	// valid, if it does not lead to that address.
	Unexpose(ctx context.Context, key Key, to netip.Addr) error
}

// Names are the DNS zones that the gateway answers for itself.
type Names interface {
	// Zones returns them in the order in which they are asked; nil is shown as null.
	Zones() []Zone
	// AddZone adds a zone as Merge does. The text of an error is shown to the client.
	AddZone(z Zone) error
}

// Switch is what the gateway knows of those on the network.
type Switch interface {
	Leases() map[netip.Addr]MAC // DHCP's, the static ones and the gateway's own address among them
	CAM() map[MAC]int           // by the address seen, the number of the connection behind which it is
	Stats() Stats
}

// Streams connects streams with the network.
type Streams interface {
	// DialGuest opens a TCP connection from the gateway to an address of the network.
	DialGuest(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	// Attach carries the frames of a VM, in the framing of gvforwarder, until the connection ends or ctx is done. early
	// has been read of the stream already. The caller closes conn.
	Attach(ctx context.Context, conn net.Conn, early []byte) error
}

// MAC is an Ethernet address.
type MAC [6]byte

// String writes the address as 5a:94:ef:e4:0c:ee.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Zone is a DNS zone that the gateway answers for.
type Zone struct {
	Name    string // as the client wrote it, usually with a dot at the end
	Records []Record
	Default netip.Addr // for names that no record has; zero: there is no such answer
}

// Record is the address of a name in a zone, or of all names that match.
type Record struct {
	Name    string         // without the zone's; "" matches nothing
	Pattern *regexp.Regexp // matched against the name without the zone's; nil: Name alone counts
	Addr    netip.Addr     // zero: none was given
}

// Merge returns zones with z in them. If there is one of its name, the records of z go before those that it has and its
// default is that of z; otherwise z is the last. Neither argument is changed.
func Merge(zones []Zone, z Zone) []Zone {
	merged := slices.Clone(zones)
	for i, old := range merged {
		if old.Name == z.Name {
			// Records that are nil stay nil: the API shows the difference.
			merged[i] = Zone{Name: z.Name, Records: append(z.Records[:len(z.Records):len(z.Records)], old.Records...), Default: z.Default}
			return merged
		}
	}
	return append(merged, z)
}
