package tcprelay

import (
	"net/netip"
	"testing"
)

func TestQuota(t *testing.T) {
	a, b := netip.MustParseAddr("10.200.1.2"), netip.MustParseAddr("10.200.1.3")
	q := NewQuota(3, 2)
	for i, step := range []struct {
		client netip.Addr
		give   bool // back, instead of take
		want   bool
	}{
		{client: a, want: true},
		{client: a, want: true},
		{client: a, want: false}, // its own limit
		{client: b, want: true},
		{client: b, want: false}, // everybody's limit
		{client: a, give: true},
		{client: b, want: true},
		{client: a, want: false},
		{client: b, give: true},
		{client: b, give: true},
		{client: a, give: true},
	} {
		if step.give {
			q.Put(step.client)
		} else if got := q.Take(step.client); got != step.want {
			t.Errorf("step %d: %v, want %v", i, got, step.want)
		}
	}
	if used, refused := q.Counts(); used != 0 || refused != 3 {
		t.Errorf("%d in use, %d refused, want 0 and 3", used, refused)
	}
	if q.used != 0 || len(q.by) != 0 {
		t.Errorf("%d in use, %v, after everything was given back", q.used, q.by)
	}
}
