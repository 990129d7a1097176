// Package cli reads how gvproxy and gvforwarder are called. Their flags, and gvproxy's file, become checked values with the
// defaults in them; to open, to listen and to write is the caller's. What it refuses wraps usernet.ErrInvalid or is a
// UsageError.
package cli

import (
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/netip"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/vsock"
)

// Gvproxy is what a command line of gvproxy asks for.
type Gvproxy struct {
	Version  bool         // to print "gvproxy version X" and nothing else; the other fields are zero
	Listen   []vsock.Addr // where to serve the whole API
	Services vsock.Addr   // where to serve it without /connect; zero: nowhere
	LogLevel slog.Level
	LogFile  string // what it had is lost at the start; "" is stderr
	PIDFile  string // the number in decimal, without a newline; removed at a clean end. "": none
	Notify   string // the path of the socket for notifications; "": none

	Hypervisors Hypervisors
	Network     Network
	Sockets     []gvproxy.Forward // sockets on the host for sockets behind an SSH server in the network, apart from the API's forwards

	Warnings []string // what was given and means nothing
}

// Hypervisors are the sockets that VMs come by, beside /connect.
type Hypervisors struct {
	VPNKit vsock.Addr // HyperKit's; zero: none, as with the others
	QEMU   vsock.Addr // QEMU's stream framing
	BESS   string     // the path of a SOCK_SEQPACKET socket
	VFKit  string     // the path of a datagram socket
	Stdio  bool       // one VM is on stdin and stdout, in HyperKit's framing without its handshake

	// MustNotExist are those of the above that are files. gvproxy does not start when one is there: another gvproxy may be
	// behind it.
	MustNotExist []string
}

// Network is the network of a gvproxy.
type Network struct {
	MTU     int          // bytes of an IP packet, 68 to 65535
	Subnet  netip.Prefix // masked, IPv4
	Gateway netip.Addr   // the gateway's own address
	Device  netip.Addr   // the address that the first VM is expected at
	Host    netip.Addr   // the host's alias

	GatewayMAC gvproxy.MAC
	VirtualIPs []netip.Addr              // further addresses that are the gateway's
	NAT        map[netip.Addr]netip.Addr // what guests dial, and what is dialled for it
	Leases     map[netip.Addr]gvproxy.MAC
	VPNKitMACs map[string]gvproxy.MAC // by the UUID of a HyperKit VM, in lower case: the address it is told to take

	Zones      []gvproxy.Zone
	Search     []string // search domains for guests
	SearchHost bool     // those of the host are meant instead
	Forwards   []gvproxy.Forward

	EC2Metadata bool   // guests may use link-local addresses, where clouds have their metadata
	Capture     string // file for all frames, in pcap; "": none
	Debug       bool   // frames are to be logged
}

// What gvproxy has where nothing is given.
const (
	defaultMTU     = 1500
	defaultSSHPort = 2222
	defaultSubnet  = "192.168.127.0/24"
	gatewayMAC     = "5a:94:ef:e4:0c:dd"
	deviceMAC      = "5a:94:ef:e4:0c:ee"
	vpnkitUUID     = "c3d68012-0208-11ea-9fd7-f2189899ab08"
	noSSHPort      = -1
)

// Default is what gvproxy without arguments does.
func Default() Gvproxy {
	g, err := ParseGvproxy(nil, nil)
	if err != nil {
		panic(err) // A test has seen that it is not.
	}
	return g
}

// ParseGvproxy reads the arguments of gvproxy, without its name. read returns the content of the file that -config names,
// like os.ReadFile; its errors are passed on.
//
// With a file, flags replace what it has, with these exceptions: -subnet, -gatewayIP, -deviceIP and -hostIP count only where the
// file is silent, -forward-sock and its like add to it, and -ssh-port and -pcap count only without a file, as do the defaults
// for DNS zones, search domains, leases, the forward to port 22 and MAC addresses of VPNKit.
//
// -ec2-metadata-access does nothing in gvproxy, where only stack.ec2MetadataAccess in the file does; here it means the same.
func ParseGvproxy(args []string, read func(path string) ([]byte, error)) (Gvproxy, error) {
	return ParseFlags(flag.NewFlagSet("gvproxy", flag.ContinueOnError), args, read)
}

// ParseFlags is ParseGvproxy for a program that has further flags, those in fs.
func ParseFlags(fs *flag.FlagSet, args []string, read func(path string) ([]byte, error)) (Gvproxy, error) {
	var fl flags
	if err := fl.parse(fs, args); err != nil {
		return Gvproxy{}, err
	}
	if fl.version {
		return Gvproxy{Version: true}, nil
	}
	var (
		f        file
		warnings []string
	)
	if fl.config != "" {
		text, err := read(fl.config)
		if err != nil {
			return Gvproxy{}, fmt.Errorf("configuration: %w", err)
		}
		if warnings, err = f.parse(text); err != nil {
			return Gvproxy{}, err
		}
		warnings = append(warnings, fl.idle()...)
	}
	if err := fl.over(&f); err != nil {
		return Gvproxy{}, err
	}
	g, err := f.check()
	if err != nil {
		return Gvproxy{}, err
	}
	if fl.config == "" {
		if err := fl.defaults(&g.Network); err != nil {
			return Gvproxy{}, err
		}
	}
	g.Warnings = append(warnings, g.Warnings...)
	return g, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w "+format, append([]any{usernet.ErrInvalid}, args...)...)
}

func mac(text string) (gvproxy.MAC, error) {
	hw, err := net.ParseMAC(text)
	if err != nil || len(hw) != len(gvproxy.MAC{}) {
		return gvproxy.MAC{}, invalid("MAC address %.64q: want six bytes as 5a:94:ef:e4:0c:ee", text)
	}
	return gvproxy.MAC(hw), nil
}

func address(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, invalid("address %.64q", text)
	}
	return a.Unmap(), nil
}
