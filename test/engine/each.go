package engine

import (
	"context"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Each runs a test with a new engine of every kind, all at the same time; USERNET_TEST_ENGINES, a list separated by
// commas, leaves some out. An engine that the machine lacks is skipped, or with USERNET_TEST_STRICT a failure. When the
// test is over, the engine goes, and usernet must not have panicked nor, with USERNET_TEST_RACE, have had a data race.
func Each(t *testing.T, run func(t *testing.T, e *Engine)) {
	for _, kind := range []Kind{Docker20(), Docker28()} {
		if !Chosen("USERNET_TEST_ENGINES", kind.Name) {
			continue
		}
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			if err := kind.Missing(); err != nil {
				if os.Getenv("USERNET_TEST_STRICT") != "" {
					t.Fatal(err)
				}
				t.Skip(err)
			}
			e, err := New(t.Context(), kind)
			if err != nil {
				t.Fatal(err)
			}
			defer e.end(t)
			run(t, e)
		})
	}
}

// EachPodman is Each for Podman.
func EachPodman(t *testing.T, run func(t *testing.T, p *Podman)) { eachPodman(t, NewPodman, run) }

// EachRootless is Each for the Podman of an ordinary user.
func EachRootless(t *testing.T, run func(t *testing.T, p *Podman)) { eachPodman(t, NewRootless, run) }

func eachPodman(t *testing.T, make func(context.Context, PodmanKind) (*Podman, error), run func(t *testing.T, p *Podman)) {
	for _, kind := range []PodmanKind{Podman54(), Podman58(), Podman61()} {
		if !Chosen("USERNET_TEST_ENGINES", kind.Name) {
			continue
		}
		t.Run(kind.Name, func(t *testing.T) {
			t.Parallel()
			if err := kind.Missing(); err != nil {
				if os.Getenv("USERNET_TEST_STRICT") != "" {
					t.Fatal(err)
				}
				t.Skip(err)
			}
			p, err := make(t.Context(), kind)
			if err != nil {
				t.Fatal(err)
			}
			defer p.end(t)
			run(t, p)
		})
	}
}

// end closes the host when its test is over.
func (h *Host) end(t *testing.T) {
	if crash := h.crash(); crash != "" {
		t.Errorf("usernet.log:\n%s", crash)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(h.Dir); !os.IsNotExist(err) {
		t.Errorf("%s is left behind: %v", h.Dir, err)
	}
}

// Chosen tells whether an environment variable, a list separated by commas, has name in it. Unset it has everything.
func Chosen(variable, name string) bool {
	v := os.Getenv(variable)
	return v == "" || slices.Contains(strings.Split(v, ","), name)
}

var crashed = regexp.MustCompile(`(?m)^(panic: |fatal error: |WARNING: DATA RACE)`)

// crash returns what usernet's log has of panics and data races.
func (h *Host) crash() string { return Crash(h.Log("usernet")) }

// Crash returns what a program's log has of panics and data races, from the first on; "" if there is no log, too.
func Crash(log string) string {
	b, err := os.ReadFile(log)
	if err != nil {
		return "" // it was never started
	}
	at := crashed.FindIndex(b)
	if at == nil {
		return ""
	}
	return string(b[at[0]:min(len(b), at[0]+8000)])
}
