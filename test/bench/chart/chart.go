// Package chart draws bars on logarithmic axes as SVG. It knows nothing of what they mean.
package chart

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"strings"
)

// Bar is one value.
type Bar struct {
	Label  string
	Value  float64 // greater than 0
	Text   string  // written behind the bar
	Colour string  // as CSS has it
}

// Panel is a group of bars with an axis of its own.
type Panel struct {
	Title string
	Bars  []Bar
}

// Sizes in pixels.
const (
	panelWidth = 620
	labels     = 250 // left of the bars
	texts      = 130 // right of the longest bar
	head       = 46  // a panel's title and axis
	row        = 17
	bar        = 12
	gap        = 24 // between panels
)

// Write draws the panels in two columns, each axis with a line at 1.
func Write(w io.Writer, title string, panels []Panel) error {
	var b strings.Builder
	y := [2]int{60, 60}
	for i, p := range panels {
		side := i % 2
		p.draw(&b, side*(panelWidth+gap)+gap, y[side])
		y[side] += head + row*len(p.Bars) + gap
	}
	width, height := 2*panelWidth+3*gap, max(y[0], y[1])
	_, err := fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d"`+
		` font-family="sans-serif" font-size="12">
<rect width="100%%" height="100%%" fill="white"/>
<text x="%d" y="36" font-size="18" font-weight="bold">%s</text>
%s</svg>
`, width, height, width, height, gap, escape(title), b.String())
	return err
}

// draw draws a panel whose upper left corner is at x, y.
func (p Panel) draw(b *strings.Builder, x, y int) {
	low, high := p.decades()
	at := func(v float64) float64 {
		return float64(x+labels) + (math.Log10(v)-low)/(high-low)*float64(panelWidth-labels-texts)
	}
	bottom := y + head + row*len(p.Bars)
	fmt.Fprintf(b, `<text x="%d" y="%d" font-size="14" font-weight="bold">%s</text>`+"\n", x, y+14, escape(p.Title))
	for d := low; d <= high; d++ {
		colour := "#ddd"
		if d == 0 {
			colour = "#444"
		}
		v := math.Pow(10, d)
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="%s"/>`, at(v), at(v), y+head-6, bottom, colour)
		fmt.Fprintf(b, `<text x="%.1f" y="%d" fill="#666" font-size="10" text-anchor="middle">%g</text>`+"\n", at(v), y+head-10, v)
	}
	left := x + labels
	for i, r := range p.Bars {
		top := y + head + row*i
		base := top + bar - 2
		fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, left-6, base, escape(r.Label))
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`,
			left, top, at(r.Value)-float64(left), bar, escape(r.Colour))
		fmt.Fprintf(b, `<text x="%.1f" y="%d" stroke="white" stroke-width="3" paint-order="stroke">%s</text>`+"\n",
			at(r.Value)+5, base, escape(r.Text))
	}
}

// decades are the ends of the axis as powers of ten: whole ones with 1 between them, the lower one so far below every
// value that there is a bar to see.
func (p Panel) decades() (low, high float64) {
	low, high = -1, 0
	for _, r := range p.Bars {
		l := math.Log10(r.Value)
		low, high = min(low, math.Floor(l-0.05)), max(high, math.Ceil(l-1e-9))
	}
	return low, high
}

func escape(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(s)) // a Builder never fails
	return b.String()
}
