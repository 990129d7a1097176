package main

import (
	_ "embed"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/usernet/usernet/test/bench/chart"
)

// pageText is the text of the page, with a place for the tables.
//
//go:embed page.md
var pageText string

// save writes the page and its plot into dir.
func (r *report) save(dir string) error {
	for name, write := range map[string]func(io.Writer) error{"benchmarks.md": r.page, "benchmarks.svg": r.plot} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if err := errors.Join(write(f), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (r *report) page(w io.Writer) error {
	var tables strings.Builder
	if err := r.markdown(&tables); err != nil {
		return err
	}
	_, err := io.WriteString(w, strings.Replace(pageText, "TABLES\n", tables.String(), 1))
	return err
}

// plotted are the measures that the plot has, by their first columns.
var plotted = []struct{ measure, title string }{
	{"tcp-up-1", "TCP out, 1 stream (longer is better)"},
	{"tcp-down-1", "TCP in, 1 stream (longer is better)"},
	{"rtt", "TCP round trip, p50 (shorter is better)"},
	{"connect-1", "New connections (longer is better)"},
	{"udp-exchange-1", "UDP exchanges (longer is better)"},
	{"udp-up", "UDP datagrams out (longer is better)"},
	{"port-up", "Published port, TCP in (longer is better)"},
	{"port-rtt", "Published port, round trip p50 (shorter is better)"},
	{"port-connect-1", "Published port, new connections (longer is better)"},
	{"local-up", "Published port from localhost, TCP in (longer is better)"},
}

// plot draws what the figures are of those of kernel veth.
func (r *report) plot(w io.Writer) error {
	var panels []chart.Panel
	for _, p := range plotted {
		i := slices.IndexFunc(measures, func(m measure) bool { return m.name == p.measure })
		c := measures[i].columns[0]
		panel := chart.Panel{Title: p.title}
		for _, s := range r.subjects {
			v := median(r.values[key{s, c}])
			if ratio := v / r.base(c); ratio > 0 {
				panel.Bars = append(panel.Bars, chart.Bar{
					Label: s.String(), Value: ratio, Colour: s.colour(), Text: figure(ratio) + "×, " + figure(v) + " " + c.unit,
				})
			}
		}
		if len(panel.Bars) > 0 {
			panels = append(panels, panel)
		}
	}
	return chart.Write(w, "Compared with a plain veth of the kernel (= 1), in one run", panels)
}

// colour tells usernet, the kernel's networks and the other user-mode networks apart.
func (s *subject) colour() string {
	switch {
	case s.isUsernet():
		return "#1f6fb4"
	case s.own:
		return "#888"
	}
	return "#e08a2e"
}
