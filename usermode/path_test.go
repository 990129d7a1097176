package usermode

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/nettest/load"
)

// pathBed is the whole way of a connection out of a usermode network, with every process in its own place:
//
//	container ─veth─ fabric ─TUN─ netstack in this process ─ its socket ─veth─ far
//	container ──────────────────────────veth───────────────────────────────── far
//
// The second way is what the first is compared with.
type pathBed struct {
	container, far *netns.NS
	netstack, veth string // the server's address on each way
}

func newPathBed(b testing.TB, v variant) *pathBed {
	p := &pathBed{container: nettest.NewNS(b), far: nettest.NewNS(b)}
	farHost, farDirect := netip.MustParsePrefix("10.200.20.2/24"), netip.MustParsePrefix("10.200.21.2/24")
	nettest.Veth(b, "tofar", netip.MustParsePrefix("10.200.20.1/24"), p.far, "host", farHost)

	// The fabric has a TUN from addTestTUN, with its default route.
	fabric := nettest.NewNS(b)
	tun := addTestTUN(b, fabric, v)
	if err := fabric.Do(func() error { return setSysctls([]sysctl{{name: "net/ipv4/ip_forward", value: "1"}}) }); err != nil {
		b.Fatal(err)
	}
	router := netip.MustParsePrefix("10.200.22.1/24")
	vethBetween(b, fabric, router, p.container, netip.MustParsePrefix("10.200.22.2/24"))
	vethBetween(b, p.far, farDirect, p.container, netip.MustParsePrefix("10.200.21.3/24"))
	nettest.Handle(b, p.container, func(h *netlink.Handle) error {
		_, dst, _ := net.ParseCIDR(farHost.String())
		return h.RouteAdd(&netlink.Route{Dst: dst, Gw: router.Addr().AsSlice()})
	})

	s, err := newNetstack(testNetstackConfig(b, v))
	if err != nil {
		b.Fatal(err)
	}
	runNetstack(b, s, tun)
	setReno(b, p.container, p.far, current(b))
	p.netstack, p.veth = load.Serve(b, p.far, farHost.Addr()), load.Serve(b, p.far, farDirect.Addr())
	return p
}

// vethBetween joins two namespaces.
func vethBetween(t testing.TB, a *netns.NS, addrA netip.Prefix, b *netns.NS, addrB netip.Prefix) {
	t.Helper()
	nameA, nameB := "v"+addrA.Addr().String(), "v"+addrB.Addr().String()
	nettest.Handle(t, a, func(h *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = nameA
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameB, PeerNamespace: netlink.NsFd(b.Fd())}); err != nil {
			return fmt.Errorf("add veth %s: %w", nameA, err)
		}
		return nettest.Addr(h, nameA, addrA)
	})
	nettest.Handle(t, b, func(h *netlink.Handle) error { return nettest.Addr(h, nameB, addrB) })
}

// pathLoads are what BenchmarkPath measures.
var pathLoads = []struct {
	name, kind string
	streams    int
	second     string // what the second number is
}{
	{"up", "up", 1, ""},
	{"up8", "up", 8, ""},
	{"down", "down", 1, ""},
	{"down8", "down", 8, ""},
	{"rr", "rr", 1, "p99"},
	{"connect", "connect", 1, ""},
	{"connect8", "connect", 8, ""},
}

func init() { load.Init(nil) }

// BenchmarkPath reports, of each load, the median on netstack's path and how that relates to the veth's. The two are
// measured alternately: this is the only figure that means anything on a machine that does other things as well. Run
// it with -benchtime 5x.
func BenchmarkPath(b *testing.B) {
	const seconds = .4
	for _, l := range pathLoads {
		b.Run(l.name, func(b *testing.B) {
			p := newPathBed(b, usual)
			var ours, theirs, ratios, tails, costs []float64
			for b.Loop() {
				t, tt := load.Drive(b, p.container, p.veth, l.kind, seconds, l.streams)
				used := processorTime(b)
				o, ot := load.Drive(b, p.container, p.netstack, l.kind, seconds, l.streams)
				costs = append(costs, (processorTime(b)-used).Seconds()/seconds/o)
				ours, theirs, ratios = append(ours, o), append(theirs, t), append(ratios, o/t)
				if l.second != "" {
					tails = append(tails, ot/tt)
				}
			}
			if os.Getenv("NSDEBUG") != "" {
				p.container.Do(func() error {
					out, _ := exec.Command("nstat", "-az").CombinedOutput()
					for _, l := range strings.Split(string(out), "\n") {
						f := strings.Fields(l)
						if len(f) > 1 && f[1] != "0" && (strings.Contains(l, "Drop") || strings.Contains(l, "OFO") || strings.Contains(l, "Prune") || strings.Contains(l, "Coll") || strings.Contains(l, "rr") || strings.Contains(l, "DSACK")) {
							println(l)
						}
					}
					return nil
				})
			}
			unit := map[string]string{"up": "Gbit/s", "down": "Gbit/s", "rr": "µs", "connect": "conn/s"}[l.kind]
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(ours), unit)
			b.ReportMetric(median(theirs), "veth-"+unit)
			b.ReportMetric(median(ratios), "ratio")
			if l.kind != "rr" {
				b.ReportMetric(1e6*median(costs), "cpu-µs/"+strings.TrimSuffix(unit, "/s"))
			}
			if l.second != "" {
				b.ReportMetric(median(tails), l.second+"-ratio")
			}
		})
	}
}

func median(vs []float64) float64 {
	vs = slices.Clone(vs)
	slices.Sort(vs)
	return vs[len(vs)/2]
}

// BenchmarkIdle reports the memory that an idle connection costs the process that netstack runs in, with ten thousand
// of them.
func BenchmarkIdle(b *testing.B) {
	const many = 10000
	p := newPathBed(b, usual)
	var most, mostResident float64 // later rounds find the memory of the first
	for b.Loop() {
		to := load.Serve(b, p.far, netip.MustParseAddrPort(p.netstack).Addr()) // the last round's ports are in TIME_WAIT
		heap, resident := memory(b)
		release := load.Hold(b, p.container, to, many)
		heapHeld, residentHeld := memory(b)
		release()
		most = max(most, float64(heapHeld-heap)/many/1024)
		mostResident = max(mostResident, float64(residentHeld-resident)/many/1024)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(most, "KiB/conn")
	b.ReportMetric(mostResident, "resident-KiB/conn")
}

// memory is what Go's heap and stacks and the whole process occupy, after collecting garbage.
func memory(t testing.TB) (inUse, resident int64) {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var size int64
	if _, err := fmt.Fscan(bytes.NewReader(statm), &size, &resident); err != nil {
		t.Fatal(err)
	}
	return int64(m.HeapAlloc + m.StackInuse), resident * int64(os.Getpagesize())
}

// processorTime is what the process that netstack runs in has used of its processors.
func processorTime(t testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// current is the namespace of the test.
func current(t testing.TB) *netns.NS {
	t.Helper()
	ns, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// setReno has new connections of the namespaces use the congestion control that every kernel has: what some machines
// use instead, bbr, halves by its pacing what even a plain veth carries.
func setReno(t testing.TB, all ...*netns.NS) {
	t.Helper()
	for _, ns := range all {
		err := ns.Do(func() error { return setSysctls([]sysctl{{name: "net/ipv4/tcp_congestion_control", value: "reno"}}) })
		if err != nil {
			t.Fatal(err)
		}
	}
}
