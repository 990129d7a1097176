package icmperror

import (
	"net/netip"
	"testing"
	"time"
)

// A guest gets so many errors and no more, and others theirs.
func TestLimit(t *testing.T) {
	var l Limit
	guest, other := netip.MustParseAddr("10.200.8.2"), netip.MustParseAddr("fd00:200:8::2")
	now := time.Unix(1000, 0)
	got := 0
	for range 3 * burst {
		if l.Take(guest, now) {
			got++
		}
	}
	if got != burst {
		t.Errorf("%d errors at once, want %d", got, burst)
	}
	if sent, held := l.Sent.Load(), l.Held.Load(); sent != burst || held != 2*burst {
		t.Errorf("counts %d sent and %d held, want %d and %d", sent, held, burst, 2*burst)
	}
	if !l.Take(other, now) {
		t.Error("another guest gets none")
	}
	if l.Take(guest, now.Add(-time.Second)) {
		t.Error("one more for an earlier time")
	}
	if !l.Take(guest, now.Add(time.Second)) {
		t.Error("none after a second")
	}
	for a := netip.MustParseAddr("10.0.0.0"); a != netip.MustParseAddr("10.1.0.0"); a = a.Next() {
		l.Take(a, now)
	}
	if len(l.buckets) > maxBuckets {
		t.Errorf("%d addresses remembered", len(l.buckets))
	}
}
