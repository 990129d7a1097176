package chart

import (
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// element is a start tag of the drawing, with the text that follows it.
type element struct {
	name, text string
	attr       map[string]string
}

func drawn(t *testing.T, title string, panels ...Panel) []element {
	t.Helper()
	var b strings.Builder
	if err := Write(&b, title, panels); err != nil {
		t.Fatal(err)
	}
	var all []element
	for d := xml.NewDecoder(strings.NewReader(b.String())); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%v:\n%s", err, b.String())
		}
		switch token := token.(type) {
		case xml.StartElement:
			e := element{name: token.Name.Local, attr: map[string]string{}}
			for _, a := range token.Attr {
				e.attr[a.Name.Local] = a.Value
			}
			all = append(all, e)
		case xml.CharData:
			if len(all) > 0 {
				all[len(all)-1].text += string(token)
			}
		}
	}
}

func bars(t *testing.T, all []element) (widths []float64) {
	t.Helper()
	for _, e := range all {
		if e.name == "rect" && e.attr["fill"] != "white" {
			w, err := strconv.ParseFloat(e.attr["width"], 64)
			if err != nil {
				t.Fatal(err)
			}
			widths = append(widths, w)
		}
	}
	return widths
}

// A tenth is always the same distance, and no value is too small for a bar.
func TestBarsAreLogarithmic(t *testing.T) {
	w := bars(t, drawn(t, "t", Panel{"p", []Bar{{Value: 10}, {Value: 1}, {Value: 0.1}, {Value: 0.01}}}))
	if len(w) != 4 || w[3] <= 0 {
		t.Fatalf("widths %v", w)
	}
	for i := range 3 {
		if d := w[i] - w[i+1]; d < w[0]-w[1]-0.2 || d > w[0]-w[1]+0.2 {
			t.Errorf("widths %v: not the same distance", w)
		}
	}
}

func TestAxis(t *testing.T) {
	for _, tt := range []struct {
		values    []float64
		low, high float64
	}{
		{nil, -1, 0},
		{[]float64{1}, -1, 0},
		{[]float64{0.5}, -1, 0},
		{[]float64{0.1}, -2, 0},
		{[]float64{0.011, 3}, -3, 1},
		{[]float64{0.02, 10}, -2, 1},
		{[]float64{200}, -1, 3},
	} {
		var p Panel
		for _, v := range tt.values {
			p.Bars = append(p.Bars, Bar{Value: v})
		}
		if low, high := p.decades(); low != tt.low || high != tt.high {
			t.Errorf("%v: axis from 10^%v to 10^%v, want %v, %v", tt.values, low, high, tt.low, tt.high)
		}
	}
}

// What is written is there, whatever characters it has, and everything is inside the picture.
func TestTextAndFrame(t *testing.T) {
	b := Bar{Label: `a <"label">`, Value: 3, Text: "3 & more", Colour: "#123"}
	all := drawn(t, "the <title>", Panel{"one", []Bar{b, b}}, Panel{"two", []Bar{b}}, Panel{"three", []Bar{b}})
	var texts []string
	for _, e := range all {
		if e.name == "text" {
			texts = append(texts, strings.TrimSpace(e.text))
		}
	}
	for _, want := range []string{"the <title>", b.Label, b.Text, "one", "three", "1", "10"} {
		if !slices.Contains(texts, want) {
			t.Errorf("%q is not in %q", want, texts)
		}
	}
	limit := map[string]string{"x": "width", "x1": "width", "x2": "width", "y": "height", "y1": "height", "y2": "height"}
	for _, e := range all[1:] {
		for name, size := range limit {
			v, ok := e.attr[name]
			if !ok {
				continue
			}
			at, err := strconv.ParseFloat(v, 64)
			if err != nil {
				t.Fatal(err)
			}
			if end, _ := strconv.ParseFloat(all[0].attr[size], 64); at < 0 || at > end {
				t.Errorf("%s %q: %s=%s is beyond %v", e.name, e.text, name, v, end)
			}
		}
	}
}
