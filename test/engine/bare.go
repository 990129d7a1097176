package engine

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// Bare runs a test on a pretend host without an engine: it has the machine's own programs, usernet and the probe. When the test is
// over, it goes, as with Each.
func Bare(t *testing.T, run func(t *testing.T, h *Host)) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h, err := newHost("")
	if err != nil {
		t.Fatal(err)
	}
	defer h.end(t)
	image, err := h.programs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.unpack(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	run(t, h)
}

// Rootfs is a root directory with the test image in it.
func (h *Host) Rootfs() string { return filepath.Join(h.Dir, "rootfs") }

func (h *Host) unpack(ctx context.Context, image string) error {
	if err := os.Mkdir(h.Rootfs(), 0o755); err != nil {
		return err
	}
	return h.Feed(ctx, image, "tar", "-x", "-C", h.Rootfs())
}
