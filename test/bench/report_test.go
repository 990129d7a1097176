package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   float64
	}{{[]float64{3}, 3}, {[]float64{9, 1}, 5}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 3, 2, 1}, 2.5}} {
		before := slices.Clone(tt.values)
		if got := median(tt.values); got != tt.want {
			t.Errorf("median %v = %v, want %v", tt.values, got, tt.want)
		}
		if diff := cmp.Diff(before, tt.values); diff != "" {
			t.Errorf("median changed its argument: %s", diff)
		}
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing = %v", got)
	}
}

func TestFigure(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 0.00004: "0", 0.00016: "0.00016", 0.0123: "0.012", 0.0999: "0.10", 0.5: "0.50", 1.239: "1.24", 9.996: "10.0",
		48.44: "48.4", 99.94: "99.9", 99.96: "100", 123.4: "123", 11064: "11064", -3: "-3.00",
	} {
		if got := figure(v); got != want {
			t.Errorf("figure(%v) = %s, want %s", v, got, want)
		}
	}
}

// sample is a report of a run with everything that can happen to a figure.
func sample() *report {
	veth, fast, peer, gone := &subject{name: "kernel veth", mtu: 1500, own: true}, &subject{name: "usernet usermode", mtu: 1500, own: true},
		&subject{name: "peer", mtu: 65520}, &subject{name: "gone", mtu: 9000, missing: errors.New("not\ninstalled")}
	r := &report{
		subjects: []*subject{veth, fast, peer, gone}, rounds: 3, length: time.Second,
		date: "2026-11-21", machine: "a machine", versions: []string{"usernet 1", "peer 2"},
		values: map[key][]float64{}, failures: map[key]error{},
	}
	up, cost := measures[slices.IndexFunc(measures, func(m measure) bool { return m.name == "tcp-up-1" })],
		measures[slices.IndexFunc(measures, func(m measure) bool { return m.name == "idle" })]
	for _, v := range []float64{40, 41, 39} {
		r.add(veth, up, []float64{v, math.NaN(), 0.5})
		r.add(fast, up, []float64{v / 2, 0.25, 0.75})
	}
	for _, v := range []float64{1, 4, 2} {
		r.add(peer, up, []float64{v, 2, 3})
	}
	r.failed(peer, up, errors.New("peer: 1 of 9 failed"))
	r.add(fast, cost, []float64{8, 10000})
	r.failed(peer, cost, errors.New("peer: no connection"))
	return r
}

func TestMarkdown(t *testing.T) {
	var b bytes.Buffer
	if err := sample().markdown(&b); err != nil {
		t.Fatal(err)
	}
	want := `2026-11-21, a machine; rounds: 3, length of a load: 1s.

usernet 1; peer 2.

### TCP out of the network

| | 1 stream out, Gbit/s |
|---|---:|
| kernel veth, MTU 1500 | 40.0 (1.00×) |
| usernet usermode, MTU 1500 | 20.0 (0.50×) |
| peer, MTU 65520 | 2.00† (0.05×) 1.00…4.00 |

† peer: 1 of 9 failed.

### Cost

| | memory of an idle connection, KiB | of so many | forwarder's CPU, TCP out, s/GB | machine's CPU, TCP out, s/GB |
|---|---:|---:|---:|---:|
| kernel veth, MTU 1500 |  |  |  | 0.50 (1.00×) |
| usernet usermode, MTU 1500 | 8.00 | 10000 | 0.25 | 0.75 (1.50×) |
| peer, MTU 65520 | † | † | 2.00† | 3.00† (6.00×) |

† peer: no connection; peer: 1 of 9 failed.

gone, MTU 9000 is missing: not installed
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestPage(t *testing.T) {
	var b bytes.Buffer
	if err := sample().page(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"# Benchmarks\n", "](benchmarks.svg)", "| 20.0 (0.50×) |"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(b.String(), "TABLES") {
		t.Error("the tables are not in their place")
	}
}

func TestPlot(t *testing.T) {
	var b bytes.Buffer
	if err := sample().plot(&b); err != nil {
		t.Fatal(err)
	}
	var svg struct {
		Text []string `xml:"text"`
		Rect []struct {
			Fill string `xml:"fill,attr"`
		} `xml:"rect"`
	}
	if err := xml.NewDecoder(&b).Decode(&svg); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	for _, want := range []string{"usernet usermode, MTU 1500", "0.50×, 20.0 Gbit/s", "0.05×, 2.00 Gbit/s"} {
		if !slices.Contains(svg.Text, want) {
			t.Errorf("the plot lacks %q", want)
		}
	}
	if len(svg.Rect) != 1+3 { // the background and a bar of each subject that was measured
		t.Errorf("%d rectangles", len(svg.Rect))
	}
}

// Every figure has a place in the tables, and every panel of the plot a measure.
func TestTablesAreComplete(t *testing.T) {
	names := map[string]bool{}
	for _, m := range measures {
		if names[m.name] {
			t.Errorf("two measures are called %s", m.name)
		}
		names[m.name] = true
		for _, c := range m.columns {
			if !slices.Contains(tables, c.table) {
				t.Errorf("%s: table %q is not printed", m.name, c.table)
			}
		}
	}
	for _, p := range plotted {
		if !names[p.measure] {
			t.Errorf("plot: no measure %s", p.measure)
		}
	}
	seen := map[string]bool{}
	for _, s := range allSubjects() {
		if seen[s.String()] {
			t.Errorf("two subjects are called %s", s)
		}
		seen[s.String()] = true
	}
}
