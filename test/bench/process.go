package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// process is one of those that carry a load.
type process struct {
	pid, parent int
	name        string
	ticks       int64 // of user and system time
}

// tick is the unit of times in /proc: USER_HZ, which is 100 on every Linux that Go runs on.
const tick = 10 * time.Millisecond

// processes returns the process top and what descends from it.
func processes(top int) []process {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	children := map[int][]process{}
	var found []process
	for _, f := range files {
		p, err := readProcess(f)
		if err != nil {
			continue // it ended meanwhile
		}
		children[p.parent] = append(children[p.parent], p)
		if p.pid == top {
			found = []process{p}
		}
	}
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i].pid]...)
	}
	return found
}

// readProcess reads a file /proc/PID/stat; see proc_pid_stat(5).
func readProcess(file string) (p process, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return p, err
	}
	return parseProcess(string(b))
}

func parseProcess(text string) (p process, err error) {
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return p, fmt.Errorf("process status %q: no name", text)
	}
	p.name = text[open+1 : end]
	f := strings.Fields(text[end+1:])
	if len(f) < 13 {
		return p, fmt.Errorf("process status %q: too short", text)
	}
	user, err1 := strconv.ParseInt(f[11], 10, 64)
	system, err2 := strconv.ParseInt(f[12], 10, 64)
	pid, err3 := strconv.Atoi(strings.TrimSpace(text[:open]))
	parent, err4 := strconv.Atoi(f[1])
	for _, err := range []error{err1, err2, err3, err4} {
		if err != nil {
			return p, fmt.Errorf("process status %q: %w", text, err)
		}
	}
	p.pid, p.parent, p.ticks = pid, parent, user+system
	return p, nil
}

// named keeps the processes of these names.
func named(ps []process, names ...string) []process {
	return slices.DeleteFunc(ps, func(p process) bool { return !slices.Contains(names, p.name) })
}

// unnamed keeps the processes of other names.
func unnamed(ps []process, name string) []process {
	return slices.DeleteFunc(ps, func(p process) bool { return p.name == name })
}

// cpu is how much processor time was used up to a moment.
type cpu struct{ forwarder, machine time.Duration }

// used adds up what the forwarder's processes have used since they started, and the whole machine since its.
func used(forwarder func() []process) (c cpu, err error) {
	if forwarder != nil {
		for _, p := range forwarder() {
			c.forwarder += time.Duration(p.ticks) * tick
		}
	}
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return c, err
	}
	c.machine, err = parseBusy(string(b))
	return c, err
}

// parseBusy reads from /proc/stat what all processors did: user, nice, system, irq and softirq time; not idle, iowait,
// or what the hypervisor took.
func parseBusy(text string) (time.Duration, error) {
	line, _, _ := strings.Cut(text, "\n")
	f := strings.Fields(line)
	if len(f) < 8 || f[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat: %q", line)
	}
	var sum time.Duration
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		sum += time.Duration(n) * tick
	}
	return sum, nil
}

// resident is the physical memory of processes in bytes.
func resident(ps []process) (sum int64, err error) {
	for _, p := range ps {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.pid))
		if err != nil {
			return 0, err
		}
		f := strings.Fields(string(b))
		if len(f) < 2 {
			return 0, fmt.Errorf("/proc/%d/statm: %q", p.pid, b)
		}
		pages, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/statm: %w", p.pid, err)
		}
		sum += pages * int64(os.Getpagesize())
	}
	return sum, nil
}
