package usermode

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/nettest"
)

// newFastBed is newPathBed with a whole fabric, whose fast path takes netstack's place.
func newFastBed(b testing.TB) *pathBed {
	p := &pathBed{far: nettest.NewNS(b)}
	farHost, farDirect := netip.MustParsePrefix("10.200.20.2/24"), netip.MustParsePrefix("10.200.21.2/24")
	nettest.Veth(b, "tofar", netip.MustParsePrefix("10.200.20.1/24"), p.far, "host", farHost)
	cfg := testConfig(b.TempDir())
	cfg.FastPath = true
	g := openFabric(b, cfg)
	if ok, err := g.FastPath(); !ok {
		b.Fatal(err)
	}
	addBridge(b, g)
	p.container = addContainer(b, g, "c1", container4, container6)
	vethBetween(b, p.far, farDirect, p.container, netip.MustParsePrefix("10.200.21.3/24"))
	nettest.Handle(b, p.container, func(h *netlink.Handle) error {
		_, dst, _ := net.ParseCIDR(farHost.String())
		return h.RouteReplace(&netlink.Route{Dst: dst, Gw: gateway4.Addr().AsSlice()})
	})
	runGateway(b, g)
	p.netstack, p.veth = startServer(b, p.far, farHost.Addr()), startServer(b, p.far, farDirect.Addr())
	return p
}

// BenchmarkFastPath is BenchmarkPath with the fast path in netstack's place.
func BenchmarkFastPath(b *testing.B) {
	const seconds = .4
	for _, l := range pathLoads {
		b.Run(l.name, func(b *testing.B) {
			p := newFastBed(b)
			var ours, theirs, ratios []float64
			for b.Loop() {
				t, _ := runAgent(b, p.container, "drive", p.veth, l.kind, seconds, l.streams)
				o, _ := runAgent(b, p.container, "drive", p.netstack, l.kind, seconds, l.streams)
				ours, theirs, ratios = append(ours, o), append(theirs, t), append(ratios, o/t)
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(ours), "ours")
			b.ReportMetric(median(theirs), "veth")
			b.ReportMetric(median(ratios), "ratio")
		})
	}
}
