package usermode

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/splice"
)

// StartTCP begins a connection to target, a container's address and port, as client, a host on the outside: the
// container sees the client's address and, unless it is in use for another connection, its port. It sees the gateway's
// address where the client's cannot stand: a loopback, link-local or otherwise special address, one of the network's
// own subnets or of the other family, or when Transparent reports false. The socket is non-blocking, connect(2) was
// called, and nothing was waited for. The caller closes it.
func (g *Gateway) StartTCP(client, target netip.AddrPort) (fd int, err error) {
	if fd, err = g.dial(unix.SOCK_STREAM, client, target); err != nil {
		return -1, fmt.Errorf("dial tcp %s: %w", target, err)
	}
	return fd, nil
}

// DialUDP is StartTCP for datagrams. The socket is connected: only target's datagrams arrive on it, and a read or write
// returns ECONNREFUSED when nobody listens there. A client port that has one flow in the fabric already, to whatever
// target, does not show in the next.
func (g *Gateway) DialUDP(client, target netip.AddrPort) (fd int, err error) {
	if fd, err = g.dial(unix.SOCK_DGRAM, client, target); err != nil {
		return -1, fmt.Errorf("dial udp %s: %w", target, err)
	}
	return fd, nil
}

// dial returns a socket in the fabric that is connected to target, or about to be, with the best source address that
// can be had.
func (g *Gateway) dial(kind int, client, target netip.AddrPort) (fd int, err error) {
	if g.cfg.Internal {
		return -1, errInternal
	}
	target = netip.AddrPortFrom(target.Addr().Unmap(), target.Port())
	subnet, ok := usernet.Network{Subnets: g.cfg.Subnets}.SubnetOf(target.Addr())
	if !ok {
		return -1, fmt.Errorf("not an address of the network: %w", usernet.ErrInvalid)
	}
	for _, src := range g.sources(client, subnet) {
		fd, err = g.connect(kind, src, target)
		if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			break
		}
	}
	return fd, err
}

// source is the local address of a socket in the fabric.
type source struct {
	addr    netip.AddrPort // invalid address: the kernel's choice; port 0 likewise
	foreign bool           // the address is not the fabric's
}

// sources are the local addresses to try for a client of a published port in subnet, best first.
func (g *Gateway) sources(client netip.AddrPort, subnet usernet.Subnet) []source {
	ip := client.Addr().Unmap()
	gateway := source{addr: netip.AddrPortFrom(subnet.Gateway, 0)}
	if g.divertErr != nil || isReserved(ip) || ip.Is4() != subnet.Prefix.Addr().Is4() || containedIn(g.prefixes(), ip) {
		return []source{gateway}
	}
	return []source{
		{addr: netip.AddrPortFrom(ip, client.Port()), foreign: true},
		{addr: netip.AddrPortFrom(ip, 0), foreign: true},
		gateway,
	}
}

// connect makes a socket in the fabric and begins to connect it.
func (g *Gateway) connect(kind int, src source, target netip.AddrPort) (int, error) {
	fd, err := g.sockets.take(kind, target.Addr())
	if err != nil {
		return -1, err
	}
	if err := start(fd, kind, src, target); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func familyOf(a netip.Addr) int {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func start(fd, kind int, src source, target netip.AddrPort) error {
	if kind == unix.SOCK_DGRAM {
		// Between bind and connect the socket would take anybody's datagrams.
		if err := dropAll(fd); err != nil {
			return err
		}
	}
	if err := bind(fd, kind, src); err != nil {
		return err
	}
	if err := unix.Connect(fd, splice.Sockaddr(target)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	if kind == unix.SOCK_DGRAM {
		return os.NewSyscallError("set SO_DETACH_FILTER", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0))
	}
	return nil
}

// bind gives the socket its source address.
func bind(fd, kind int, src source) error {
	if !src.addr.Addr().IsValid() {
		return nil
	}
	if src.foreign {
		if err := splice.SetTransparent(fd, src.addr.Addr()); err != nil {
			return err
		}
	}
	// One client port may have connections to several targets; connect finds out about true collisions. It does not
	// for UDP, where the latest socket would take the datagrams of the other, so there a bound port is taken.
	if kind == unix.SOCK_STREAM {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("set SO_REUSEADDR", err)
		}
	}
	// With port 0, connect chooses one that is free for this target, instead of bind one that is free for all.
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return os.NewSyscallError("set IP_BIND_ADDRESS_NO_PORT", err)
	}
	return os.NewSyscallError("bind", unix.Bind(fd, splice.Sockaddr(src.addr)))
}

// dropAll attaches a filter to the socket that lets nothing in.
func dropAll(fd int) error {
	prog := unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	return os.NewSyscallError("set SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog))
}
