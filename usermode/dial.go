package usermode

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// dialTimeout bounds DialTCP: a container on the same bridge that has not answered a third SYN will not.
const dialTimeout = 10 * time.Second

// DialTCP connects to target, a container's address and port, as client, a host on the outside: the container sees
// the client's address and, unless it is in use for another connection, its port. It sees the gateway's address where the
// client's cannot stand: a loopback, link-local or otherwise special address, one of the network's own subnets or of
// the other family, or when Transparent reports false. It gives up after ten seconds or when ctx is done; the error
// wraps ECONNREFUSED, EHOSTUNREACH or ctx's error. The caller closes the connection.
func (g *Gateway) DialTCP(ctx context.Context, client, target netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	f, err := g.dial(unix.SOCK_STREAM, client, target)
	if err != nil {
		return nil, fmt.Errorf("dial tcp %s: %w", target, err)
	}
	defer f.Close()
	if err := awaitConnect(ctx, f); err != nil {
		return nil, fmt.Errorf("dial tcp %s: %w", target, err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("dial tcp %s: %w", target, err)
	}
	return c.(*net.TCPConn), nil
}

// DialUDP is DialTCP for datagrams. The socket is connected: only target's datagrams arrive on it, and a Read or Write
// returns ECONNREFUSED when nobody listens there. A client port that has one flow in the fabric already, to whatever
// target, does not show in the next.
func (g *Gateway) DialUDP(client, target netip.AddrPort) (*net.UDPConn, error) {
	f, err := g.dial(unix.SOCK_DGRAM, client, target)
	if err != nil {
		return nil, fmt.Errorf("dial udp %s: %w", target, err)
	}
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("dial udp %s: %w", target, err)
	}
	return c.(*net.UDPConn), nil
}

// dial returns a socket in the fabric that is connected to target, or about to be, with the best source address that
// can be had.
func (g *Gateway) dial(kind int, client, target netip.AddrPort) (*os.File, error) {
	if g.cfg.Internal {
		return nil, errInternal
	}
	target = netip.AddrPortFrom(target.Addr().Unmap(), target.Port())
	subnet, ok := usernet.Network{Subnets: g.cfg.Subnets}.SubnetOf(target.Addr())
	if !ok {
		return nil, fmt.Errorf("not an address of the network: %w", usernet.ErrInvalid)
	}
	var fd int
	var err error
	for _, src := range g.sources(client, subnet) {
		fd, err = g.connect(kind, src, target)
		if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), target.String()), nil
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

// connect makes a socket in the fabric and begins to connect it. Only making it needs a thread in the namespace.
func (g *Gateway) connect(kind int, src source, target netip.AddrPort) (_ int, err error) {
	family := unix.AF_INET
	if target.Addr().Is6() {
		family = unix.AF_INET6
	}
	var fd int
	err = g.netns.Do(func() (err error) {
		fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if kind == unix.SOCK_DGRAM {
		// Between bind and connect the socket would take anybody's datagrams.
		if err := dropAll(fd); err != nil {
			return 0, err
		}
	}
	if err := bind(fd, kind, family, src); err != nil {
		return 0, err
	}
	if err := unix.Connect(fd, sockaddr(target)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return 0, os.NewSyscallError("connect", err)
	}
	if kind == unix.SOCK_DGRAM {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
		return fd, os.NewSyscallError("set SO_DETACH_FILTER", err)
	}
	return fd, nil
}

// bind gives the socket its source address.
func bind(fd, kind, family int, src source) error {
	if !src.addr.Addr().IsValid() {
		return nil
	}
	if src.foreign {
		if err := setTransparent(fd, family); err != nil {
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
	return os.NewSyscallError("bind", unix.Bind(fd, sockaddr(src.addr)))
}

// dropAll attaches a filter to the socket that lets nothing in.
func dropAll(fd int) error {
	prog := unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	return os.NewSyscallError("set SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog))
}

// awaitConnect waits in the runtime's poller, not on a thread, until the connect of f's socket is decided.
func awaitConnect(ctx context.Context, f *os.File) error {
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = rc.Write(func(fd uintptr) bool {
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			result = os.NewSyscallError("get SO_ERROR", err)
			return true
		}
		if errno != 0 {
			result = os.NewSyscallError("connect", unix.Errno(errno))
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return !errors.Is(err, unix.ENOTCONN)
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	return errors.Join(err, result)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
