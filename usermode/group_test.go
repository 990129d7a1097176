package usermode

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// groupListener listens in ns for what is sent to port, and to the group on the interface.
func groupListener(t *testing.T, ns *netns.NS, group netip.Addr, port int, link string) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	err := ns.Do(func() (err error) {
		if conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: port}); err != nil {
			return err
		}
		i, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		var serr error
		err = raw.Control(func(fd uintptr) {
			serr = unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: group.As4(), Ifindex: int32(i.Index)})
		})
		if err != nil {
			return err
		}
		return serr
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// What is for everybody on the network is for everybody on the network: the neighbours get it, the host does not, and
// nobody complains about it (RFC 1122, section 3.2.2).
func TestGroupsStayInside(t *testing.T) {
	g := openFabric(t, testConfig(t.TempDir()))
	nettest.Host(t, host4, host6)
	addBridge(t, g)
	ns := addContainer(t, g, "c1", container4)
	neighbour := addContainer(t, g, "c2", netip.MustParsePrefix("10.200.1.3/24"))
	runGateway(t, g)
	here, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()

	const port = 5353
	group := netip.MustParseAddr("239.1.2.3") // of the organisation: a router might forward it
	outside := groupListener(t, here, group, port, "pretendhost")
	inside := groupListener(t, neighbour, group, port, "eth0")
	var from *net.UDPConn
	err = ns.Do(func() (err error) {
		from, err = net.ListenUDP("udp4", nil)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	raw, err := from.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_TTL, 8); err != nil {
			t.Error(err)
		}
		if err := icmperror.Ask(int(fd), true); err != nil {
			t.Error(err)
		}
	})
	for _, to := range []string{group.String(), "255.255.255.255", "10.200.1.255"} {
		if _, err := from.WriteToUDPAddrPort([]byte(to), netip.AddrPortFrom(netip.MustParseAddr(to), port)); err != nil {
			t.Fatalf("send to %s: %v", to, err)
		}
		b := make([]byte, 100)
		inside.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, _, err := inside.ReadFrom(b); err != nil || string(b[:n]) != to {
			t.Errorf("the neighbour received %q, %v, want what went to %s", b[:n], err, to)
		}
	}
	// What was sent later, to the host itself, comes first.
	if _, err := from.WriteToUDPAddrPort([]byte("host"), netip.AddrPortFrom(host4.Addr(), port)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	outside.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, client, err := outside.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "host" {
		t.Errorf("the host received %q, %v, want only what was for it", b[:n], err)
	}
	// The answer comes after any error would have.
	if _, err := outside.WriteToUDPAddrPort([]byte("answer"), client); err != nil {
		t.Fatal(err)
	}
	from.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, _, err := from.ReadFrom(b); err != nil {
		t.Error(err)
	}
	raw.Control(func(fd uintptr) {
		var q icmperror.Queue
		if e, more := q.Read(int(fd)); more {
			t.Errorf("ICMP error %+v about a packet to %s", e.Message, e.To)
		}
	})
}
