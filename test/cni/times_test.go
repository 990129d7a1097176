package cni_test

import (
	"fmt"
	"os"
	"slices"
	"time"
)

// times compares ADD and DEL with those of the official chain in one run: one container after the other, and fifty at
// once. CNI_ROUNDS is how often. It reports the ratios and judges none: machines are noisy.
func times(r *rig) {
	rounds := 5
	fmt.Sscan(os.Getenv("CNI_ROUNDS"), &rounds)
	r.compare(1, rounds)
	r.compare(50, max(1, rounds/5))
}

// compare measures with so many containers at once.
func (r *rig) compare(count, rounds int) {
	r.Helper()
	chains := append([]chain{official("official")}, networks("")...)
	var spaces []string
	for range count {
		spaces = append(spaces, r.space())
	}
	added, deleted := map[string][]time.Duration{}, map[string][]time.Duration{}
	for range rounds {
		for _, c := range chains {
			results := make([]string, count)
			start := time.Now()
			each(count, func(i int) { results[i] = r.chainAdd(c, spaces[i], 20000+i) })
			middle := time.Now()
			each(count, func(i int) { r.chainDel(c, spaces[i], 20000+i, results[i]) })
			added[c.name] = append(added[c.name], middle.Sub(start))
			deleted[c.name] = append(deleted[c.name], time.Since(middle))
		}
	}
	for _, c := range chains {
		for command, took := range map[string]map[string][]time.Duration{"ADD": added, "DEL": deleted} {
			d := median(took[c.name])
			ratio := float64(d) / float64(median(took["official"]))
			r.Logf("%2d at once, %-8s %s %8.1f ms, %.2f times the official chain", count, c.name, command, float64(d)/1e6, ratio)
		}
	}
}

func median(ds []time.Duration) time.Duration {
	ds = slices.Sorted(slices.Values(ds))
	return ds[len(ds)/2]
}
