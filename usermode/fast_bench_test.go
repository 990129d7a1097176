package usermode

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/nettest/load"
)

// newFabricBed is newPathBed with a whole fabric, and its fast path if asked for.
func newFabricBed(b testing.TB, fast bool) *pathBed {
	p := &pathBed{far: nettest.NewNS(b)}
	farHost, farDirect := netip.MustParsePrefix("10.200.20.2/24"), netip.MustParsePrefix("10.200.21.2/24")
	nettest.Veth(b, "tofar", netip.MustParsePrefix("10.200.20.1/24"), p.far, "host", farHost)
	cfg := testConfig(b.TempDir())
	cfg.FastPath = fast
	g := openFabric(b, cfg)
	if ok, err := g.FastPath(); ok != fast {
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
	setReno(b, p.container, p.far, g.Netns(), current(b))
	p.netstack, p.veth = load.Serve(b, p.far, farHost.Addr()), load.Serve(b, p.far, farDirect.Addr())
	return p
}

// BenchmarkFabric is BenchmarkPath through a whole fabric, on both of its paths.
func BenchmarkFabric(b *testing.B) {
	const seconds = .4
	for _, l := range pathLoads {
		for _, fast := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/fast=%t", l.name, fast), func(b *testing.B) {
				p := newFabricBed(b, fast)
				var ours, theirs, ratios []float64
				for b.Loop() {
					t, _ := load.Drive(b, p.container, p.veth, l.kind, seconds, l.streams)
					o, _ := load.Drive(b, p.container, p.netstack, l.kind, seconds, l.streams)
					ours, theirs, ratios = append(ours, o), append(theirs, t), append(ratios, o/t)
				}
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(median(ours), "ours")
				b.ReportMetric(median(theirs), "veth")
				b.ReportMetric(median(ratios), "ratio")
			})
		}
	}
}
