package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/usernet/usernet/test/bench/load"
)

// column is one figure of every subject.
type column struct {
	table, title, unit string
	alone              bool // it is not compared with the first subject's
}

// measure is one thing that is done with a subject; it gives a figure for each of its columns.
type measure struct {
	name    string
	columns []column
	suits   func(*subject) bool
	run     func(*rig, *subject) ([]float64, error)
}

// The tables, in their order.
const (
	outTable       = "TCP out of the network"
	delayTable     = "TCP round trips and new connections, out of the network"
	udpTable       = "UDP, datagrams of 1400 bytes that arrive"
	exchangeTable  = "UDP round trips and ping"
	portTable      = "Published port, client outside"
	localTable     = "Published port, client on the host's loopback"
	costTable      = "Cost"
	neighbourTable = "Container to container"
	lifeTable      = "Containers come and go"
)

var tables = []string{
	outTable, delayTable, udpTable, exchangeTable, portTable, localTable, costTable, neighbourTable, lifeTable,
}

// path is where a load goes: from a client to the address of a server.
type path struct {
	client, server *load.Remote
	addr           netip.AddrPort
}

func outward(b *rig, s *subject) (path, error) { return path{s.site.inside, b.outside, farAgent}, nil }

func toGateway(b *rig, s *subject) (path, error) {
	return path{s.site.inside, nil, netip.AddrPortFrom(s.site.gateway, 0)}, nil
}

func fromOutside(b *rig, s *subject) (path, error) {
	return path{b.outside, s.site.inside, s.site.published}, nil
}

func fromLocalhost(b *rig, s *subject) (path, error) {
	return path{b.local, s.site.inside, s.site.local}, nil
}

type way func(*rig, *subject) (path, error)

func carriesOut(s *subject) bool { return !s.ports }
func publishes(s *subject) bool  { return s.site.published.IsValid() }

var measures = slices.Concat(
	idleMeasures(),
	outMeasures(),
	udpMeasures(),
	portMeasures("port-", portTable, fromOutside),
	portMeasures("local-", localTable, fromLocalhost),
	dockerMeasures(),
)

func measureNames() string {
	var names []string
	for _, m := range measures {
		names = append(names, m.name)
	}
	return strings.Join(names, " ")
}

func outMeasures() []measure {
	var ms []measure
	for _, n := range []int{1, 8} {
		title := fmt.Sprintf("%d streams", n)
		if n == 1 {
			title = "1 stream"
		}
		for _, d := range []struct {
			name, title string
			kind        load.Kind
		}{{"up", "out", load.TCPUp}, {"down", "in", load.TCPDown}} {
			m := measure{
				name:    fmt.Sprintf("tcp-%s-%d", d.name, n),
				columns: []column{{outTable, title + " " + d.title, "Gbit/s", false}},
				suits:   carriesOut, run: transfer(outward, d.kind, n),
			}
			if n == 1 {
				m.columns = append(m.columns,
					column{costTable, "forwarder's CPU, TCP " + d.title, "s/GB", true},
					column{costTable, "machine's CPU, TCP " + d.title, "s/GB", false})
				m.run = costly(d.kind)
			}
			ms = append(ms, m)
		}
	}
	return append(ms,
		measure{"rtt", []column{{delayTable, "p50", "µs", false}, {delayTable, "p99", "µs", false}}, carriesOut, trips(outward)},
		measure{"connect-1", []column{{delayTable, "connections", "/s", false}}, carriesOut, connects(outward, 1)},
		measure{"connect-8", []column{{delayTable, "connections, 8 at a time", "/s", false}}, carriesOut, connects(outward, 8)},
		measure{"connect-32", []column{{delayTable, "connections, 32 at a time", "/s", false}}, carriesOut, connects(outward, 32)},
	)
}

func portMeasures(prefix, table string, w way) []measure {
	return []measure{
		{prefix + "up", []column{{table, "to the container", "Gbit/s", false}}, publishes, transfer(w, load.TCPUp, 1)},
		{prefix + "down", []column{{table, "from it", "Gbit/s", false}}, publishes, transfer(w, load.TCPDown, 1)},
		{prefix + "rtt", []column{{table, "p50", "µs", false}, {table, "p99", "µs", false}}, publishes, trips(w)},
		{prefix + "connect-1", []column{{table, "connections", "/s", false}}, publishes, connects(w, 1)},
		{prefix + "connect-8", []column{{table, "connections, 8 at a time", "/s", false}}, publishes, connects(w, 8)},
	}
}

func udpMeasures() []measure {
	arrive := func(title string) []column {
		return []column{{udpTable, title, "k/s", false}, {udpTable, title, "Gbit/s", false}}
	}
	return []measure{
		{"udp-up", arrive("out"), carriesOut, datagrams(load.UDPUp)},
		{"udp-down", arrive("in"), carriesOut, datagrams(load.UDPDown)},
		{"udp-exchange-1", []column{{exchangeTable, "exchanges", "/s", false}}, carriesOut, exchanges(1)},
		{"udp-exchange-16", []column{{exchangeTable, "exchanges, 16 under way", "/s", false}}, carriesOut, exchanges(16)},
		{"ping-gateway", []column{{exchangeTable, "ping the gateway, p50", "µs", false}}, carriesOut, pings(toGateway)},
		{"ping-outside", []column{{exchangeTable, "ping the outside, p50", "µs", false}}, carriesOut, pings(outward)},
	}
}

func dockerMeasures() []measure {
	docker, neighbour := (*subject).isDocker, (*rig).neighbour
	delay := []column{{neighbourTable, "p50", "µs", false}, {neighbourTable, "p99", "µs", false}}
	life := []column{
		{lifeTable, "network create + run + rm + network rm", "ms", false},
		{lifeTable, "run --rm with two published ports", "ms", false},
	}
	return []measure{
		{"neighbour-tcp", []column{{neighbourTable, "TCP", "Gbit/s", false}}, docker, transfer(neighbour, load.TCPUp, 1)},
		{"neighbour-rtt", delay, docker, trips(neighbour)},
		{"lifecycle", life, docker, (*rig).lifecycle},
	}
}

// drive does one job from one end of a path to the other.
func (b *rig) drive(p path, j load.Job) (load.Result, error) {
	b.jobs++
	j.ID, j.Addr = b.jobs, p.addr
	if j.Length == 0 {
		j.Length = b.length
	}
	r, err := p.client.Drive(b.ctx, j)
	if err == nil && (j.Kind == load.TCPUp || j.Kind == load.UDPUp) {
		r, err = p.server.Received(b.ctx, j)
	}
	return r, err
}

// job is a measure of one job, whose figures are what figures takes from its result. Where a part of the job failed
// there are figures and an error.
func job(w way, j load.Job, figures func(load.Result) []float64) func(*rig, *subject) ([]float64, error) {
	return func(b *rig, s *subject) ([]float64, error) {
		p, err := w(b, s)
		if err != nil {
			return nil, err
		}
		r, err := b.drive(p, j)
		if err != nil {
			return nil, err
		}
		if r.Failed > 0 {
			err = fmt.Errorf("%d of %d failed: %s", r.Failed, r.Done+r.Failed, r.Failure)
		}
		return figures(r), err
	}
}

func rate(r load.Result) []float64 { return []float64{r.Rate()} }

func transfer(w way, kind load.Kind, streams int) func(*rig, *subject) ([]float64, error) {
	return job(w, load.Job{Kind: kind, Streams: streams}, func(r load.Result) []float64 { return []float64{r.Gbits()} })
}

func connects(w way, workers int) func(*rig, *subject) ([]float64, error) {
	return job(w, load.Job{Kind: load.TCPConnect, Streams: workers}, rate)
}

func datagrams(kind load.Kind) func(*rig, *subject) ([]float64, error) {
	return job(outward, load.Job{Kind: kind}, func(r load.Result) []float64 { return []float64{r.Rate() / 1000, r.Gbits()} })
}

func exchanges(underWay int) func(*rig, *subject) ([]float64, error) {
	return job(outward, load.Job{Kind: load.UDPExchange, Streams: underWay}, rate)
}

func pings(w way) func(*rig, *subject) ([]float64, error) {
	return job(w, load.Job{Kind: load.Ping}, func(r load.Result) []float64 { return []float64{microseconds(r.P50)} })
}

// costly is one stream out of the network together with the processor time it takes.
func costly(kind load.Kind) func(*rig, *subject) ([]float64, error) {
	return func(b *rig, s *subject) ([]float64, error) {
		before, err := used(s.site.forwarder)
		if err != nil {
			return nil, err
		}
		p, err := outward(b, s)
		if err != nil {
			return nil, err
		}
		r, err := b.drive(p, load.Job{Kind: kind})
		if err != nil {
			return nil, err
		}
		after, err := used(s.site.forwarder)
		if err != nil {
			return nil, err
		}
		gigabytes := float64(r.Bytes) / 1e9
		forwarder := (after.forwarder - before.forwarder).Seconds() / gigabytes
		if s.site.forwarder == nil {
			forwarder = math.NaN()
		}
		return []float64{r.Gbits(), forwarder, (after.machine - before.machine).Seconds() / gigabytes}, nil
	}
}

// shortRuns is how many connections the round trips of one measurement are spread over. Where the scheduler puts the
// processes makes them one of a fast or of a slow kind: the median of several says which is the usual one.
const shortRuns = 5

func trips(w way) func(*rig, *subject) ([]float64, error) {
	return func(b *rig, s *subject) ([]float64, error) {
		p, err := w(b, s)
		if err != nil {
			return nil, err
		}
		var p50, p99 []float64
		for range shortRuns {
			r, err := b.drive(p, load.Job{Kind: load.TCPEcho, Length: b.length / shortRuns})
			if err != nil {
				return nil, err
			}
			p50, p99 = append(p50, microseconds(r.P50)), append(p99, microseconds(r.P99))
		}
		return []float64{median(p50), median(p99)}, nil
	}
}

func idleMeasures() []measure {
	return []measure{{
		name: "idle",
		columns: []column{
			{costTable, "memory of an idle connection", "KiB", true},
			{costTable, "of so many", "", true},
		},
		suits: func(s *subject) bool { return !s.ports && s.site.forwarder != nil },
		run:   (*rig).idleConnections,
	}}
}

// idleConnections is what the forwarder's physical memory grows by with many connections that were used once. It begins
// and ends with a fresh forwarder: a garbage collector gives memory back late.
func (b *rig) idleConnections(s *subject) (_ []float64, err error) {
	if err := s.site.restart(); err != nil {
		return nil, err
	}
	j := load.Job{Addr: farAgent, Streams: 10, Length: 30 * time.Second}
	if _, err := s.site.inside.Hold(b.ctx, j); err != nil { // what the first connections cost is not theirs
		return nil, err
	}
	before, err := resident(s.site.forwarder())
	if err != nil {
		return nil, err
	}
	j.Streams = b.idle
	r, err := s.site.inside.Hold(b.ctx, j)
	if err != nil {
		return nil, err
	}
	after, err := resident(s.site.forwarder())
	if err != nil {
		return nil, err
	}
	reached := r.Done - 10
	if err := errors.Join(s.site.inside.Release(b.ctx), s.site.restart()); err != nil {
		return nil, err
	}
	if reached <= 0 {
		return nil, errors.New("no connection was made")
	}
	if reached < b.idle {
		err = fmt.Errorf("only %d of %d connections were made in %v: %s", reached, b.idle, r.Elapsed.Round(time.Millisecond), r.Failure)
	}
	return []float64{float64(after-before) / 1024 / float64(reached), float64(reached)}, err
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
