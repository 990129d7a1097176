package main

import (
	"os"
	"slices"
	"testing"
	"time"
)

func TestParseProcess(t *testing.T) {
	got, err := parseProcess("42 (a b) c) S 7 42 42 0 -1 4194560 1 2 3 4 150 25 9 9 20 0 8 0 100 200 300\n")
	if want := (process{pid: 42, parent: 7, name: "a b) c", ticks: 175}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "42 a S 7", "42 (a) S 7", "x (a) S 7 0 0 0 0 0 0 0 0 0 1 2", "42 (a) S 7 0 0 0 0 0 0 0 0 0 1 y", ") ("} {
		if p, err := parseProcess(bad); err == nil {
			t.Errorf("%q: %+v, no error", bad, p)
		}
	}
}

func TestParseBusy(t *testing.T) {
	got, err := parseBusy("cpu  100 10 20 5000 300 4 6 70 80 90\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
	if want := 140 * tick; err != nil || got != want {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{"", "cpu 1 2 3", "intr 1 2 3 4 5 6 7 8", "cpu a b c d e f g h"} {
		if d, err := parseBusy(bad); err == nil {
			t.Errorf("%q: %v, no error", bad, d)
		}
	}
}

// What this process does shows in its own figures.
func TestOwnProcess(t *testing.T) {
	own := func() []process { return processes(os.Getpid()) }
	before, err := used(own)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(own(), func(p process) bool { return p.pid == os.Getpid() && p.parent == os.Getppid() }) {
		t.Errorf("%+v: without this process", own())
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		after, err := used(own)
		if err != nil {
			t.Fatal(err)
		}
		if after.forwarder > before.forwarder && after.machine > before.machine {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("from %+v to %+v in 20 s of work", before, after)
		}
	}
	rss, err := resident(own())
	if err != nil {
		t.Fatal(err)
	}
	ballast := make([]byte, 64<<20)
	for i := 0; i < len(ballast); i += os.Getpagesize() {
		ballast[i] = 1
	}
	more, err := resident(own())
	if err != nil {
		t.Fatal(err)
	}
	if grown := more - rss; grown < 60<<20 || grown > 200<<20 {
		t.Errorf("64 MiB of ballast are %d bytes of memory", grown)
	}
	ballast[0]++
}
