package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report is what was measured.
type report struct {
	subjects []*subject
	rounds   int
	length   time.Duration
	date     string
	machine  string
	versions []string
	values   map[key][]float64 // one of each round
	failures map[key]error     // the last one
}

// key is a column of a subject.
type key struct {
	s *subject
	c column
}

func newReport(b *rig) *report {
	return &report{
		subjects: b.subjects, rounds: b.rounds, length: b.length,
		date: time.Now().Format(time.DateOnly), machine: machine(), versions: b.versions(),
		values: map[key][]float64{}, failures: map[key]error{},
	}
}

func (r *report) add(s *subject, m measure, values []float64) {
	for i, v := range values {
		if k := (key{s, m.columns[i]}); !math.IsNaN(v) {
			r.values[k] = append(r.values[k], v)
		}
	}
}

func (r *report) failed(s *subject, m measure, err error) {
	for _, c := range m.columns {
		r.failures[key{s, c}] = err
	}
}

// machine describes where this runs.
func machine() string {
	model := "unknown CPU"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if m := regexp.MustCompile(`(?m)^model name\s*: (.*)$`).FindSubmatch(b); m != nil {
			model = string(m[1])
		}
	}
	kernel, _ := exec.Command("uname", "-sr").Output()
	return fmt.Sprintf("%s, %d CPUs, %s", model, runtime.NumCPU(), strings.TrimSpace(string(kernel)))
}

// versions names the version of everybody who is there.
func (b *rig) versions() []string {
	docker, _ := b.Docker(b.ctx, "version", "--format", "Docker {{.Server.Version}}")
	own, _ := b.Usernet(b.ctx, "version")
	list := []string{own, docker}
	for _, args := range [][]string{
		{"pasta", "--version"}, {"slirp4netns", "--version"}, {"gvproxy", "-version"}, {"gvforwarder", "-version"},
		{"rootlesskit", "--version"},
	} {
		path, err := b.installed(args[0])
		if err != nil {
			continue
		}
		out, _ := b.Run(b.ctx, path, args[1:]...)
		line, _, _ := strings.Cut(out, "\n")
		list = append(list, line)
	}
	return list
}

// median is the middle one of some values, between the two middle ones their mean; NaN of none.
func median(vs []float64) float64 {
	if len(vs) == 0 {
		return math.NaN()
	}
	vs = slices.Sorted(slices.Values(vs))
	return (vs[(len(vs)-1)/2] + vs[len(vs)/2]) / 2
}

// columns are those of a table that have figures or failures.
func (r *report) columns(table string) []column {
	var cs []column
	for _, m := range measures {
		for _, c := range m.columns {
			if c.table == table && slices.ContainsFunc(r.subjects, func(s *subject) bool { return r.has(s, c) }) {
				cs = append(cs, c)
			}
		}
	}
	return cs
}

func (r *report) has(s *subject, c column) bool {
	return len(r.values[key{s, c}]) > 0 || r.failures[key{s, c}] != nil
}

// base is what a column's figures are compared with: the first subject's that has one.
func (r *report) base(c column) float64 {
	for _, s := range r.subjects {
		if vs := r.values[key{s, c}]; len(vs) > 0 && !c.alone {
			return median(vs)
		}
	}
	return math.NaN()
}

// markdown writes all tables.
func (r *report) markdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s; rounds: %d, length of a load: %v.\n\n", r.date, r.machine, r.rounds, r.length)
	fmt.Fprintf(&b, "%s.\n", strings.Join(r.versions, "; "))
	for _, t := range tables {
		r.table(&b, t)
	}
	for _, s := range r.subjects {
		if s.missing != nil {
			fmt.Fprintf(&b, "\n%s is missing: %s\n", s, oneLine(s.missing))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *report) table(b *strings.Builder, table string) {
	columns := r.columns(table)
	if len(columns) == 0 {
		return
	}
	fmt.Fprintf(b, "\n### %s\n\n| |", table)
	for _, c := range columns {
		fmt.Fprintf(b, " %s |", strings.TrimSuffix(c.title+", "+c.unit, ", "))
	}
	fmt.Fprint(b, "\n|---|"+strings.Repeat("---:|", len(columns))+"\n")
	var notes []string
	for _, s := range r.subjects {
		if !slices.ContainsFunc(columns, func(c column) bool { return r.has(s, c) }) {
			continue
		}
		fmt.Fprintf(b, "| %s |", s)
		for _, c := range columns {
			if err := r.failures[key{s, c}]; err != nil {
				if n := oneLine(err); !slices.Contains(notes, n) {
					notes = append(notes, n)
				}
			}
			fmt.Fprintf(b, " %s |", r.cell(s, c))
		}
		fmt.Fprintln(b)
	}
	if len(notes) > 0 {
		fmt.Fprintf(b, "\n† %s.\n", strings.Join(notes, "; "))
	}
}

// noisy is the spread of a figure's rounds, as a part of their median, from which on it is shown.
const noisy = 0.25

// cell is a figure, how it compares with the base, and the spread of noisy rounds.
func (r *report) cell(s *subject, c column) string {
	vs := r.values[key{s, c}]
	failed := ""
	if r.failures[key{s, c}] != nil {
		failed = "†"
	}
	if len(vs) == 0 {
		return failed
	}
	m := median(vs)
	text := figure(m) + failed
	if ratio := m / r.base(c); !math.IsNaN(ratio) && !math.IsInf(ratio, 0) {
		text += " (" + figure(ratio) + "×)"
	}
	if low, high := slices.Min(vs), slices.Max(vs); high-low > noisy*m {
		text += fmt.Sprintf(" %s…%s", figure(low), figure(high))
	}
	return text
}

// figure writes a number with two or three digits that say something.
func figure(v float64) string {
	switch a := math.Abs(v); {
	case a >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.0995:
		return fmt.Sprintf("%.2f", v)
	case a >= 0.0001:
		return fmt.Sprintf("%.2g", v)
	}
	return "0"
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
