package vmnet

import (
	"bytes"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/l2"
)

// TestStaysRouter: a machine that asks whether its router is still there keeps its default route. The answer said of the gateway that it
// was none, and the machine took it from its list (RFC 4861, 7.2.5).
func TestStaysRouter(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	m.addr6()
	eventually(t, "it has a default route", func() bool { return m.routers() > 0 })
	nettest.Handle(t, m.ns, func(h *netlink.Handle) error {
		n := m.router(h)
		n.State = netlink.NUD_PROBE
		return h.NeighSet(n)
	})
	eventually(t, "the router has answered", func() (answered bool) {
		nettest.Handle(t, m.ns, func(h *netlink.Handle) error {
			answered = m.router(h).State == netlink.NUD_REACHABLE
			return nil
		})
		return answered
	})
	if m.routers() == 0 {
		t.Error("the default route has gone")
	}
}

// routers is the number of its default routes for IPv6.
func (m *machine) routers() (n int) {
	m.t.Helper()
	nettest.Handle(m.t, m.ns, func(h *netlink.Handle) error {
		routes, err := h.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{}, netlink.RT_FILTER_DST)
		n = len(routes)
		return err
	})
	return n
}

// router is the machine's neighbour with the gateway's link-local address.
func (m *machine) router(h *netlink.Handle) *netlink.Neigh {
	m.t.Helper()
	link, err := h.LinkByName(tapName)
	if err != nil {
		m.t.Fatal(err)
	}
	list, err := h.NeighList(link.Attrs().Index, netlink.FAMILY_V6)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, n := range list {
		if n.IP.IsLinkLocalUnicast() && bytes.Equal(n.HardwareAddr, gatewayMAC[:]) {
			return &n
		}
	}
	m.t.Fatalf("the gateway is none of %v", list)
	return nil
}
