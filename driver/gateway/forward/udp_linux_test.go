package forward

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/internal/nettest"
)

// TestUDPSource: a client is answered from the address that it has asked, which a connected socket insists on.
func TestUDPSource(t *testing.T) {
	noLeaks(t)
	h, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	addr := netip.MustParsePrefix("2001:db8::2/128")
	if err := nettest.Addr(h, "lo", addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Fatal(err)
		}
		a := &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), 128)}
		if err := netlink.AddrDel(lo, &netlink.Addr{IPNet: a}); err != nil {
			t.Error(err)
		}
	})
	// The kernel says so before it has the route.
	eventually(t, "the address is local", func() bool {
		routes, err := h.RouteGet(addr.Addr().AsSlice())
		return err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
	})
	local := freePort(t, "")
	f := start(t, newFake(), gvproxy.UDP, local, udpMachine(t, "127.0.0.1"), nil)
	for _, host := range []string{"127.0.0.1", "127.0.0.2", "127.1.2.3", "::1", "2001:db8::2"} {
		askUDP(t, dial(t, "udp", port(t, host, local)), "hello "+host)
	}

	// Two of the host's addresses are two flows, also for one socket of a client.
	pc, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	buffer := make([]byte, 10)
	for _, host := range []string{"127.0.0.2", "127.0.0.3", "127.0.0.2"} {
		to := netip.MustParseAddrPort(port(t, host, local))
		if _, err := pc.WriteToUDPAddrPort([]byte("hello"), to); err != nil {
			t.Fatal(err)
		}
		if _, from, err := pc.ReadFromUDPAddrPort(buffer); err != nil || plain(from) != to {
			t.Errorf("answer from %s, %v, want %s", from, err, to)
		}
	}
	if got, want := f.Stats(), (Stats{Active: 7, Accepted: 7}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

// TestUDPMulticast: what is not for this host alone is not forwarded; nobody could be answered from there.
func TestUDPMulticast(t *testing.T) {
	s := socket{anywhere: true}
	for addr, want := range map[string]bool{"192.0.2.1": true, "224.0.0.1": false, "255.255.255.255": false} {
		a := netip.MustParseAddr(addr)
		to, ok := s.destination(unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: 2, Addr: a.As4()}))
		if ok != want || to != (local{addr: a}) {
			t.Errorf("%s: %v, %v, want %v", addr, to, ok, want)
		}
	}
	s.v6 = true
	for addr, want := range map[string]bool{"2001:db8::1": true, "fe80::1": true, "ff02::1": false} {
		a := netip.MustParseAddr(addr)
		to, ok := s.destination(unix.PktInfo6(&unix.Inet6Pktinfo{Ifindex: 2, Addr: a.As16()}))
		if ok != want || to.addr != a || (to.index == 2) != a.IsLinkLocalUnicast() {
			t.Errorf("%s: %v, %v, want %v", addr, to, ok, want)
		}
	}
}
