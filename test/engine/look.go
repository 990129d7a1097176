package engine

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
)

// Look is how patiently a test looks for what is served.
type Look struct {
	Patience time.Duration // until it is there
	Attempt  time.Duration // each time; 0: as long as Get has
}

// Page fetches a page from a namespace; it must contain all of want.
func (l Look) Page(t testing.TB, from *netns.NS, addr string, want ...string) {
	t.Helper()
	Wait(t, l.Patience, "the page", func() error { return l.Fetch(t.Context(), from, addr, want...) })
}

// Fetch fetches a page once, and tells whether it contains all of want.
func (l Look) Fetch(ctx context.Context, from *netns.NS, addr string, want ...string) error {
	text, err := l.get(ctx, from, addr)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", addr, err)
	}
	for _, w := range want {
		if !strings.Contains(text, w) {
			return fmt.Errorf("fetch %s: got %q, want %q", addr, text, w)
		}
	}
	return nil
}

func (l Look) get(ctx context.Context, from *netns.NS, addr string) (string, error) {
	if l.Attempt > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, l.Attempt)
		defer cancel()
	}
	return Get(ctx, from, addr)
}

// NoPage checks that nobody serves a page there.
func (l Look) NoPage(t testing.TB, from *netns.NS, addr string) {
	t.Helper()
	if text, err := l.get(t.Context(), from, addr); err == nil {
		t.Errorf("fetch %s: worked: %q", addr, text)
	}
}

// UDP asks a UDP server from a namespace; the answer must contain want.
func (l Look) UDP(t testing.TB, from *netns.NS, addr, want string) {
	t.Helper()
	Wait(t, l.Patience, "an answer by UDP", func() error {
		text, err := AskUDP(t.Context(), from, addr, "knock")
		if err != nil || !strings.Contains(text, want) || !strings.HasSuffix(text, " knock") {
			return fmt.Errorf("udp %s: got %q, %v; want %q", addr, text, err, want)
		}
		return nil
	})
}
