package portmap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/splice"
	"github.com/usernet/usernet/internal/undo"
)

// listener is a socket that clients come to, and the host's address it is bound to.
type listener struct {
	fd int
	at netip.Addr
}

// claim is one port number with its sockets, taken but not yet served.
type claim struct {
	proto usernet.Proto
	port  uint16
	tcp   []listener
	udp   []listener
	undo  undo.List
}

// hostAddrs are the addresses that p is published at.
func hostAddrs(p usernet.Port) []netip.Addr {
	if p.HostIP.IsValid() {
		return []netip.Addr{p.HostIP}
	}
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
}

// ephemeralTries bounds how often the kernel is asked for a port that may turn out taken in the other family.
const ephemeralTries = 64

// candidates are the host ports that would do for p, in the order to try them. 0 is the kernel's choice, which may
// come out differently each time.
func candidates(p usernet.Port) ([]uint16, error) {
	if p.HostPort != 0 {
		ports := make([]uint16, 0, int(p.HostPortEnd)-int(p.HostPort)+1)
		for port := int(p.HostPort); port <= int(p.HostPortEnd); port++ {
			ports = append(ports, uint16(port))
		}
		return ports, nil
	}
	if p.Proto != usernet.SCTP {
		return make([]uint16, ephemeralTries), nil
	}
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return nil, fmt.Errorf("choose a port: %w", err)
	}
	var low, high uint16
	if _, err := fmt.Sscan(string(b), &low, &high); err != nil || low == 0 || high < low {
		return nil, fmt.Errorf("choose a port: net.ipv4.ip_local_port_range is %q", b)
	}
	size := int(high) - int(low) + 1
	ports := make([]uint16, size)
	start := rand.IntN(size)
	for i := range ports {
		ports[i] = low + uint16((start+i)%size)
	}
	return ports, nil
}

// try takes port, or the kernel's choice if it is 0, at all addresses of the request. After an error the claim holds
// what had been taken until then.
func (m *Mapper) try(req Request, port uint16) (*claim, error) {
	c := &claim{proto: req.Port.Proto, port: port}
	addrs := hostAddrs(req.Port)
	unbound := addrs
	if port == 0 {
		if err := c.bind(addrs[0]); err != nil {
			return c, err
		}
		unbound = addrs[1:]
	}
	s := slot{c.proto, c.port}
	if at, holder, ok := m.table.reserve(s, addrs, req.Owner); !ok {
		return c, &takenError{c.proto, netip.AddrPortFrom(at, c.port), holder}
	}
	c.undo.Push(func() error { m.table.release(s, addrs); return nil })
	for _, a := range unbound {
		err := c.bind(a)
		if a.Is6() && len(addrs) > 1 && noSuchFamily(err) {
			continue
		}
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

// noSuchFamily reports whether a wildcard could not be bound because the host does without its family.
func noSuchFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// bind opens a socket at addr and c.port; if that is 0, it becomes the port the kernel chose. SCTP has no sockets.
func (c *claim) bind(addr netip.Addr) error {
	at := netip.AddrPortFrom(addr, c.port)
	switch c.proto {
	case usernet.TCP:
		fd, port, err := splice.Listen(at, false)
		if err != nil {
			return bindError(c.proto, at, err)
		}
		c.tcp = append(c.tcp, listener{fd, addr})
		c.undo.Push(func() error { return unix.Close(fd) })
		c.port = port
	case usernet.UDP:
		fd, port, err := listenUDP(at)
		if err != nil {
			return bindError(c.proto, at, err)
		}
		c.udp = append(c.udp, listener{fd, addr})
		c.undo.Push(func() error { return unix.Close(fd) })
		c.port = port
	}
	return nil
}

// takenError is a conflict over a host port. It wraps usernet.ErrPortTaken.
type takenError struct {
	proto  usernet.Proto
	at     netip.AddrPort
	holder string // "": not known
}

func (e *takenError) Error() string {
	s := fmt.Sprintf("bind %s/%s: %v", e.at, e.proto, usernet.ErrPortTaken)
	if e.holder != "" {
		s += " by " + e.holder
	}
	return s
}

func (e *takenError) Unwrap() error { return usernet.ErrPortTaken }

// findHolder looks for the process that has the port, if it was not found in the table.
func (e *takenError) findHolder() {
	if e.holder == "" {
		e.holder = processAt(e.proto, e.at)
	}
}

// bindError says what is wrong with at, without the layers around the errno.
func bindError(proto usernet.Proto, at netip.AddrPort, err error) error {
	errno, ok := errors.AsType[syscall.Errno](err)
	switch {
	case !ok:
		return fmt.Errorf("bind %s/%s: %w", at, proto, err)
	case errno == unix.EADDRINUSE:
		return &takenError{proto: proto, at: at}
	case errno == unix.EADDRNOTAVAIL:
		return fmt.Errorf("bind %s/%s: not an address of this host: %w", at, proto, errno)
	case errno == unix.EACCES:
		return fmt.Errorf("bind %s/%s: %w: a privileged port needs CAP_NET_BIND_SERVICE, or sysctl net.ipv4.ip_unprivileged_port_start=%d", at, proto, errno, at.Port())
	}
	return fmt.Errorf("bind %s/%s: %w", at, proto, errno)
}
