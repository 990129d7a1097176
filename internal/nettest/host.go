package nettest

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host gives the test's own namespace addresses of a host, by a bridge called pretendhost, until the test ends.
func Host(t testing.TB, addrs ...netip.Prefix) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "pretendhost"
	link := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(link); errors.Is(err, os.ErrExist) {
		return // made by the process whose fuzzing worker this is
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(link) })
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, a := range addrs {
		if err := Addr(h, attrs.Name, a); err != nil {
			t.Fatal(err)
		}
		AwaitLocal(t, h, a.Addr())
	}
}

// AwaitLocal waits until the kernel of h's namespace takes packets for a: for IPv6, it makes itself the route for that in its own time.
func AwaitLocal(t testing.TB, h *netlink.Handle, a netip.Addr) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		routes, err := h.RouteGet(a.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not become local: %v, %v", a, routes, err)
		}
	}
}
