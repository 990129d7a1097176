// Package held finds out which published ports an engine has bound itself, by looking at the sockets of other processes. It
// changes nothing about them.
package held

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/control"
)

// Rootful Podman binds the published ports before it asks for the network, so that nobody else can have them, and leaves the
// sockets to the container's monitor, conmon. (containers.conf, enable_port_reservation.) Up to 5.8 it binds IPv4's
// wildcard only where no address is given. The daemon must know which ports these are: it cannot bind them, and must
// not mistake somebody else's for them.

// binding is what a socket is bound to.
type binding struct {
	proto usernet.Proto
	at    netip.AddrPort
}

// Ports marks the ports that Podman, the process engine, holds for a container, or the container's monitor does. One for
// which it holds only IPv4's half becomes two.
func Ports(containerID string, engine int, ports []control.Port) ([]control.Port, error) {
	b, err := look(containerID, engine, ports)
	if err != nil {
		return nil, err
	}
	return b.mark(ports, hasIPv6()), nil
}

// Expected is Ports where the engine may bind the ports only after it has asked for the network, as Podman 4.3 does with CNI: those
// that nobody has count as held. One that somebody else has is usernet.ErrPortTaken.
func Expected(containerID string, engine int, ports []control.Port) ([]control.Port, error) {
	b, err := look(containerID, engine, ports)
	if err != nil {
		return nil, err
	}
	for _, p := range ports {
		if err := b.expect(p); err != nil {
			return nil, err
		}
	}
	return b.mark(ports, hasIPv6()), nil
}

// look finds what the engine's sockets are bound to and, if that is not all ports, the sockets of the container's monitor.
func look(containerID string, engine int, ports []control.Port) (bound, error) {
	b := bound{}
	if len(ports) == 0 {
		return b, nil
	}
	if engine > 1 {
		if err := b.add(engine); err != nil {
			return nil, err
		}
	}
	if b.holdsAll(ports) {
		return b, nil
	}
	// A container that runs already, or Podman has let go of its ports.
	for _, pid := range monitors(containerID) {
		if err := b.add(pid); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// bound is what the sockets of some processes are bound to.
type bound map[binding]bool

// holds tells whether a port is bound at an address, or at all addresses of its family.
func (b bound) holds(p control.Port, a netip.Addr) bool {
	all := netip.IPv4Unspecified()
	if a.Is6() {
		all = netip.IPv6Unspecified()
	}
	return b[binding{p.Proto, netip.AddrPortFrom(a, p.HostPort)}] || b[binding{p.Proto, netip.AddrPortFrom(all, p.HostPort)}]
}

func (b bound) holdsAll(ports []control.Port) bool {
	return !slices.ContainsFunc(ports, func(p control.Port) bool {
		if p.HostIP.IsValid() {
			return !b.holds(p, p.HostIP)
		}
		return !b.holds(p, netip.IPv4Unspecified())
	})
}

// expect adds what the engine will bind for a port: IPv4's wildcard where no address is given.
func (b bound) expect(p control.Port) error {
	at := p.HostIP
	if !at.IsValid() {
		at = netip.IPv4Unspecified()
	}
	if b.holds(p, at) || p.Proto == usernet.SCTP {
		return nil
	}
	if err := free(p.Proto, netip.AddrPortFrom(at, p.HostPort)); err != nil {
		return fmt.Errorf("%s: %w: %w", p.Value(), usernet.ErrPortTaken, err)
	}
	b[binding{p.Proto, netip.AddrPortFrom(at, p.HostPort)}] = true
	return nil
}

// free tells why nothing could be bound there.
func free(proto usernet.Proto, at netip.AddrPort) error {
	var c io.Closer
	var err error
	family := "4" // Go would take an IPv4 wildcard for that of both families
	if at.Addr().Is6() {
		family = "6"
	}
	if proto == usernet.UDP {
		c, err = net.ListenUDP("udp"+family, net.UDPAddrFromAddrPort(at))
	} else {
		c, err = net.ListenTCP("tcp"+family, net.TCPAddrFromAddrPort(at))
	}
	if err != nil {
		return err
	}
	return c.Close()
}

// mark tells which ports are held.
func (b bound) mark(ports []control.Port, ipv6 bool) []control.Port {
	marked := make([]control.Port, 0, len(ports))
	for _, p := range ports {
		if p.HostIP.IsValid() {
			p.Held = b.holds(p, p.HostIP)
			marked = append(marked, p)
			continue
		}
		four, six := b.holds(p, netip.IPv4Unspecified()), b.holds(p, netip.IPv6Unspecified())
		if four == six {
			p.Held = four
			marked = append(marked, p)
			continue
		}
		other := p
		p.HostIP, p.Held = netip.IPv4Unspecified(), four
		other.HostIP, other.Held = netip.IPv6Unspecified(), six
		marked = append(marked, p)
		if ipv6 || six {
			marked = append(marked, other)
		}
	}
	return marked
}

func hasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// add adds what the sockets of a process are bound to. They are looked at in person (pidfd_getfd(2)): a TCP socket
// that is bound and does not listen shows in no table.
func (b bound) add(pid int) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it has ended
	}
	if err != nil {
		return fmt.Errorf("list the sockets of process %d: %w", pid, err)
	}
	process, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(process)
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err != nil || !bytes.HasPrefix([]byte(target), []byte("socket:")) {
			continue
		}
		fd, err := unix.PidfdGetfd(process, n, 0)
		if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
			continue // closed meanwhile
		}
		if err != nil {
			return fmt.Errorf("look at the sockets of process %d: %w", pid, err)
		}
		for _, at := range boundTo(fd) {
			b[at] = true
		}
		unix.Close(fd)
	}
	return nil
}

// boundTo is empty for what is no TCP or UDP socket. A socket of both families is bound in both.
func boundTo(fd int) []binding {
	var b binding
	switch kind, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); kind {
	case unix.SOCK_STREAM:
		b.proto = usernet.TCP
	case unix.SOCK_DGRAM:
		b.proto = usernet.UDP
	}
	sa, err := unix.Getsockname(fd)
	if err != nil || b.proto == "" {
		return nil
	}
	if p, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); p == unix.IPPROTO_SCTP {
		b.proto = usernet.SCTP
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		b.at = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		a := netip.AddrFrom16(sa.Addr).Unmap()
		b.at = netip.AddrPortFrom(a, uint16(sa.Port))
		only, err := unix.GetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY)
		if a == netip.IPv6Unspecified() && err == nil && only == 0 {
			return []binding{b, {b.proto, netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(sa.Port))}}
		}
	default:
		return nil
	}
	return []binding{b}
}

// Parent is the parent of a process.
func Parent(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("find the parent of process %d: %w", pid, err)
	}
	// The name in parentheses may have anything in it.
	i := bytes.LastIndexByte(text, ')')
	var state string
	var ppid int
	if _, err := fmt.Sscan(string(text[i+1:]), &state, &ppid); err != nil {
		return 0, fmt.Errorf("find the parent of process %d: %w", pid, err)
	}
	return ppid, nil
}

// monitors are the processes called conmon that were started for the container.
func monitors(containerID string) []int {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return nil
	}
	var pids []int
	for _, name := range names {
		if comm, err := os.ReadFile(name); err != nil || string(bytes.TrimSpace(comm)) != "conmon" {
			continue
		}
		dir := filepath.Dir(name)
		args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !bytes.Contains(args, []byte("\x00"+containerID+"\x00")) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
