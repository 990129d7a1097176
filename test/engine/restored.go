package engine

import (
	"context"
	"testing"
	"time"
)

// Restored runs a test and then clean, after which the host must look as it did before. If anything failed, what the daemons logged
// meanwhile is shown.
func (h *Host) Restored(t *testing.T, clean, test func()) {
	logs, before := h.LogSizes(), h.Looks(t)
	defer func() {
		clean()
		Wait(t, 10*time.Second, "the host to look as before", func() error { return before.Same(h.Looks(t)) })
		if t.Failed() {
			t.Logf("logs since the test began:\n%s", h.LogsSince(logs))
		}
	}()
	test()
}

// Looks is a Snapshot of the host, which a test may take after its end.
func (h *Host) Looks(t testing.TB) Snapshot {
	t.Helper()
	s, err := h.Snapshot(context.WithoutCancel(t.Context()))
	if err != nil {
		t.Errorf("snapshot: %v", err)
	}
	return s
}
