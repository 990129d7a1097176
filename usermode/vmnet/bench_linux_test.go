package vmnet

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest/load"
	"github.com/usernet/usernet/usermode/l2"
)

// BenchmarkTCP has a machine in a namespace of its own exchange with a server on the host: Gbit/s, microseconds, or connections a
// second. What a machine without large frames gets is HyperKit's.
func BenchmarkTCP(b *testing.B) {
	for _, framing := range []l2.Framing{l2.Usernet, l2.HyperKit} {
		for _, mtu := range []int{1500, 65520} {
			if framing == l2.HyperKit && mtu > 65521 {
				continue
			}
			b.Run(fmt.Sprintf("%s/%d", framing, mtu), func(b *testing.B) { benchTCP(b, framing, mtu) })
		}
	}
}

// cpuTime is what this process has spent.
func cpuTime() time.Duration {
	var r unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func benchTCP(b *testing.B, framing l2.Framing, mtu int) {
	cfg := testConfig(b)
	cfg.MTU = mtu
	bed := newBed(b, cfg)
	m := bed.machine(2, framing)
	to := load.Serve(b, nil, host4.Addr())
	const seconds = 2
	for _, l := range []struct {
		kind    string
		streams int
		unit    string
	}{
		{"up", 1, "Gbit/s"}, {"down", 1, "Gbit/s"}, {"up", 8, "Gbit/s"}, {"down", 8, "Gbit/s"},
		{"rr", 1, "µs"}, {"connect", 4, "conn/s"},
	} {
		b.Run(fmt.Sprintf("%s-%d", l.kind, l.streams), func(b *testing.B) {
			var sum float64
			before := cpuTime()
			for range b.N {
				v, _ := load.Drive(b, m.ns, to, l.kind, seconds, l.streams)
				sum += v
			}
			b.ReportMetric(sum/float64(b.N), l.unit)
			// On a busy machine this is what can be compared: what the gateway itself spends.
			if spent := (cpuTime() - before).Seconds(); l.unit == "conn/s" {
				b.ReportMetric(spent*1e6/(sum*seconds), "cpu-µs/conn")
			} else if l.unit == "Gbit/s" {
				b.ReportMetric(spent/(sum*seconds), "cpu-s/Gbit")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
	s := bed.Stats()
	b.Logf("lost %d, foreign %d, spoofed %d", s.Lost, s.Foreign, s.Spoofed)
}
