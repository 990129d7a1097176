package gvproxy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
)

// Proto is what listens on the host for a forward.
type Proto string

// The protocols.
const (
	TCP   Proto = "tcp"
	UDP   Proto = "udp"
	Unix  Proto = "unix"  // a unix stream socket
	NPipe Proto = "npipe" // a named pipe of Windows
)

// Key names a forward: there is one of each key.
type Key struct {
	Proto Proto
	Local string // TCP, UDP: HOST:PORT, the host as for net.Listen; Unix: a path; NPipe: a URL, npipe:////./pipe/NAME
}

// Forward is something of the network that can be reached on the host.
type Forward struct {
	Key
	Remote string         // as the API shows it
	Target netip.AddrPort // where connections go; with SSH, the SSH server
	SSH    *SSH           // nil: connections are Target's own
}

// SSH is a unix socket behind an SSH server.
type SSH struct {
	User       string
	Path       string // of the socket, on the server
	KeyFile    string // on the host, the private key
	Passphrase string // of the key; "" none
}

var errRemote = errors.New("invalid remote addr")

// ParseForward checks a forward as the API and gvproxy's file give it. For TCP and UDP the remote is ADDRESS:PORT, an IPv6
// address in brackets; for Unix and NPipe it is tcp://ADDRESS:PORT or
// ssh-tunnel://USER@ADDRESS[:22]/PATH?key=FILE[&passphrase=TEXT]. What it says of faults is what gvproxy says. The local
// side is found out by listening.
func ParseForward(proto Proto, local, remote string) (f Forward, err error) {
	f = Forward{Key: Key{proto, local}, Remote: remote}
	switch proto {
	case TCP, UDP:
		f.Target, err = target(remote)
	case Unix, NPipe:
		f.Target, f.SSH, err = behindSocket(remote)
	default:
		err = fmt.Errorf("unknown protocol %s", proto)
	}
	return f, err
}

// target reads ADDRESS:PORT.
func target(remote string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(remote)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return addrPort(host, port)
}

func addrPort(host, port string) (netip.AddrPort, error) {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" {
		return netip.AddrPort{}, errRemote
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), nil
}

// behindSocket reads what a unix socket or a pipe leads to.
func behindSocket(remote string) (netip.AddrPort, *SSH, error) {
	u, err := url.Parse(remote)
	if err != nil {
		return netip.AddrPort{}, nil, fmt.Errorf("failed to parse remote uri :%s : %w", remote, err)
	}
	switch u.Scheme {
	case "tcp":
		to, err := addrPort(u.Hostname(), u.Port())
		return to, nil, err
	case "ssh-tunnel":
		return overSSH(u)
	}
	return netip.AddrPort{}, nil, fmt.Errorf("remote protocol for unix forwarder is not implemented: %s", u.Scheme)
}

func overSSH(u *url.URL) (netip.AddrPort, *SSH, error) {
	query := u.Query()
	ssh := &SSH{User: u.User.Username(), Path: u.Path, KeyFile: query.Get("key"), Passphrase: query.Get("passphrase")}
	if ssh.KeyFile == "" {
		return netip.AddrPort{}, nil, errors.New("key not provided for unix-ssh connection")
	}
	if ssh.Path == "" || ssh.Path == "/" {
		return netip.AddrPort{}, nil, errors.New("remote uri must contain a path to a socket file")
	}
	port := u.Port()
	if port == "" {
		port = "22"
	}
	to, err := addrPort(u.Hostname(), port)
	return to, ssh, err
}

// complete puts the caller's address into a remote that has none, as in :8080. The caller is as http.Request has it.
func complete(remote, caller string) (string, error) {
	host, port, err := net.SplitHostPort(remote)
	if err != nil || host != "" {
		return remote, err
	}
	if host, _, err = net.SplitHostPort(caller); err != nil {
		return "", err
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		host = plain(addr).String()
	}
	return net.JoinHostPort(host, port), nil
}

// plain is an address as others know it: an IPv4 one as such, and without the name of an interface here.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }
