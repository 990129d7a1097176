package splice

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// backlog is how many connections may wait to be accepted; the kernel's limit is net.core.somaxconn.
const backlog = 4096

// Listen opens a listening TCP socket at the address, port 0 meaning one of the kernel's choice, and returns the port.
// transparent has it take connections to any address that are sent its way (IP_TRANSPARENT).
func Listen(at netip.AddrPort, transparent bool) (fd int, port uint16, err error) {
	if fd, err = Socket(at.Addr()); err != nil {
		return -1, 0, err
	}
	if port, err = listen(fd, at, transparent); err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, port, nil
}

func listen(fd int, at netip.AddrPort, transparent bool) (port uint16, err error) {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return 0, os.NewSyscallError("set SO_REUSEADDR", err)
	}
	if at.Addr().Is6() {
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return 0, os.NewSyscallError("set IPV6_V6ONLY", err)
		}
	}
	if transparent {
		if err := SetTransparent(fd, at.Addr()); err != nil {
			return 0, err
		}
	}
	if err := unix.Bind(fd, Sockaddr(at)); err != nil {
		return 0, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return 0, os.NewSyscallError("listen", err)
	}
	sa, err := unix.Getsockname(fd)
	return AddrPort(sa).Port(), os.NewSyscallError("getsockname", err)
}

// Keep-alives find out within two minutes that the other end of an idle connection is gone.
const keepIdle, keepInterval, keepCount = 60, 15, 4 // seconds, seconds, probes

// Socket makes a non-blocking TCP socket for addresses of a's family. What is relayed has been delayed once already: it
// is sent at once.
func Socket(a netip.Addr) (fd int, err error) {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	// Plain TCP: splice(2) does not work on an MPTCP socket.
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP); err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	for _, o := range [...]struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepIdle},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepInterval},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepCount},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			unix.Close(fd)
			return -1, os.NewSyscallError("setsockopt", err)
		}
	}
	return fd, nil
}

// SetTransparent lets fd have an address that is not the machine's (needs CAP_NET_ADMIN). a tells the family.
func SetTransparent(fd int, a netip.Addr) error {
	if a.Is6() {
		return os.NewSyscallError("set IPV6_TRANSPARENT", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1))
	}
	return os.NewSyscallError("set IP_TRANSPARENT", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1))
}

// Sockaddr is a for a system call. A zone is an interface's number.
func Sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	zone, _ := strconv.ParseUint(a.Addr().Zone(), 10, 32)
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: uint32(zone)}
}

// AddrPort is what a system call answered; not valid for what is neither IPv4 nor IPv6. A zone is an interface's number.
func AddrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		a := netip.AddrFrom16(sa.Addr).Unmap()
		if sa.ZoneId != 0 {
			a = a.WithZone(strconv.FormatUint(uint64(sa.ZoneId), 10))
		}
		return netip.AddrPortFrom(a, uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// Accept takes a connection that waits at the listening socket fd; EAGAIN: there is none. The connection has the
// listener's options.
func Accept(fd int) (conn int, peer netip.AddrPort, err error) {
	for {
		conn, sa, err := unix.Accept4(fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch err {
		case nil:
			return conn, AddrPort(sa), nil
		case unix.EINTR, unix.ECONNABORTED:
			continue
		}
		return -1, netip.AddrPort{}, err
	}
}

// listener is a listening socket that a group serves.
type listener struct {
	group    *Group
	worker   *worker
	fd       int
	slot     int32
	log      *slog.Logger
	events   uint32 // what is waited for; worker.mu
	accepted func(int, netip.AddrPort)
	pause    Pause
	timer    *timer // while nothing is accepted
}

func (l *listener) servedBy() *worker { return l.worker }

// accepts is how many connections are accepted before others have a turn.
const accepts = 64

func (l *listener) ready(uint8, uint32) {
	for range accepts {
		conn, peer, err := Accept(l.fd)
		switch {
		case err == nil:
			l.pause.Reset()
			l.accepted(conn, peer)
		case errors.Is(err, unix.EAGAIN):
			return
		default:
			l.rest(err)
			return
		}
	}
}

// rest accepts nothing for a while.
func (l *listener) rest(err error) {
	if l.pause.First() {
		l.log.Warn("cannot accept connections for a while", "err", err)
	}
	w := l.worker
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ctl(unix.EPOLL_CTL_MOD, l.fd, 0, l.slot, w.slots[l.slot].gen)
	l.timer = w.scheduleLocked(time.Now().Add(l.pause.Next()), func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		l.timer = nil
		w.ctl(unix.EPOLL_CTL_MOD, l.fd, l.events, l.slot, w.slots[l.slot].gen)
	})
}

// expect waits for connections or stops it. After the group was closed, it does nothing.
func (l *listener) expect(yes bool) {
	w := l.worker
	w.mu.Lock()
	defer w.mu.Unlock()
	l.events = 0
	if yes {
		l.events = unix.EPOLLIN
	}
	if l.slot != unwatched && l.timer == nil {
		w.ctl(unix.EPOLL_CTL_MOD, l.fd, l.events, l.slot, w.slots[l.slot].gen)
	}
}

func (l *listener) cut() {
	w := l.worker
	if l.slot == unwatched {
		return
	}
	unix.EpollCtl(w.epoll, unix.EPOLL_CTL_DEL, l.fd, nil)
	w.mu.Lock()
	w.unwatchLocked(l.slot)
	l.slot = unwatched // expect may still be called
	if l.timer != nil {
		w.unscheduleLocked(l.timer)
	}
	w.mu.Unlock()
	l.group.leave(l)
}
