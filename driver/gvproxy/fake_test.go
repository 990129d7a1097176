package gvproxy

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/usernet/usernet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a gateway without a network: it keeps what it is told.
type fake struct {
	mu       sync.Mutex
	forwards map[Key]Forward
	zones    []Zone

	leases map[netip.Addr]MAC
	cam    map[MAC]int
	stats  Stats
	broken error // what Expose fails with

	dial   func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	attach func(ctx context.Context, conn net.Conn, early []byte) error
}

func newFake(forwards ...Forward) *fake {
	f := &fake{forwards: make(map[Key]Forward)}
	for _, fwd := range forwards {
		f.forwards[fwd.Key] = fwd
	}
	return f
}

func (f *fake) Forwards() []Forward {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.forwards))
}

func (f *fake) Expose(ctx context.Context, fwd Forward) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.forwards[fwd.Key]; ok {
		return usernet.ErrExists
	}
	if _, ok := ctx.Deadline(); !ok {
		return errors.New("the context has no end")
	}
	if f.broken != nil {
		return f.broken
	}
	f.forwards[fwd.Key] = fwd
	return nil
}

func (f *fake) Unexpose(_ context.Context, key Key, to netip.Addr) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	fwd, ok := f.forwards[key]
	if !ok || to.IsValid() && fwd.Target.Addr() != to {
		return usernet.ErrNotFound
	}
	delete(f.forwards, key)
	return nil
}

func (f *fake) Zones() []Zone {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.zones
}

func (f *fake) AddZone(z Zone) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.zones = Merge(f.zones, z)
	return nil
}

func (f *fake) Leases() map[netip.Addr]MAC { return f.leases }
func (f *fake) CAM() map[MAC]int           { return f.cam }
func (f *fake) Stats() Stats               { return f.stats }

func (f *fake) DialGuest(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return f.dial(ctx, to)
}

func (f *fake) Attach(ctx context.Context, conn net.Conn, early []byte) error {
	return f.attach(ctx, conn, early)
}

// forward is a forward that is known to be right.
func forward(t testing.TB, proto Proto, local, remote string) Forward {
	t.Helper()
	f, err := ParseForward(proto, local, remote)
	if err != nil {
		t.Fatal(err)
	}
	return f
}
