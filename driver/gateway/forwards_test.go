package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
)

// opener is a host on which forwards are opened. Each is open until its key's gate is closed, if it has one.
type opener struct {
	mu    sync.Mutex
	opens map[gvproxy.Key]int
	fault error
	gate  chan struct{} // nil: nothing waits
	began chan struct{}
}

func (o *opener) open(_ context.Context, f gvproxy.Forward) (io.Closer, error) {
	if o.gate != nil {
		o.began <- struct{}{}
		<-o.gate
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fault != nil {
		return nil, o.fault
	}
	if o.opens == nil {
		o.opens = make(map[gvproxy.Key]int)
	}
	if o.opens[f.Key]++; o.opens[f.Key] > 1 {
		return nil, errors.New("opened twice")
	}
	return closer(func() error {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.opens[f.Key]--
		return nil
	}), nil
}

func (o *opener) count() (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, opens := range o.opens {
		n += opens
	}
	return n
}

type closer func() error

func (c closer) Close() error { return c() }

func tcp(t testing.TB, local, remote string) gvproxy.Forward {
	t.Helper()
	f, err := gvproxy.ParseForward(gvproxy.TCP, local, remote)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

var (
	nobody = netip.Addr{}
	vm2    = netip.MustParseAddr("192.168.127.2")
	vm3    = netip.MustParseAddr("192.168.127.3")
)

func TestForwards(t *testing.T) {
	o := &opener{}
	table := newForwards(o.open)
	f := tcp(t, ":8080", "192.168.127.2:80")
	if err := table.add(t.Context(), f, nobody); err != nil {
		t.Fatal(err)
	}
	if err := table.add(t.Context(), f, nobody); !errors.Is(err, usernet.ErrExists) {
		t.Errorf("the host asks again: %v, want ErrExists", err)
	}
	if err := table.add(t.Context(), f, vm2); !errors.Is(err, usernet.ErrExists) {
		t.Errorf("a guest asks for what the host has: %v, want ErrExists", err)
	}
	if err := table.remove(f.Key, vm3); !errors.Is(err, usernet.ErrNotFound) {
		t.Errorf("another guest ends it: %v, want ErrNotFound", err)
	}
	if got := table.all(); len(got) != 1 || got[0].Key != f.Key {
		t.Errorf("forwards %v", got)
	}
	if err := table.remove(f.Key, vm2); err != nil {
		t.Errorf("its guest ends it: %v", err)
	}
	if err := table.remove(f.Key, nobody); !errors.Is(err, usernet.ErrNotFound) {
		t.Errorf("ended twice: %v, want ErrNotFound", err)
	}
	o.fault = errors.New("listen tcp :8080: permission denied")
	if err := table.add(t.Context(), f, nobody); err != o.fault {
		t.Errorf("error %v, want it as it came", err)
	}
	o.fault = nil
	if err := table.add(t.Context(), f, vm2); err != nil {
		t.Errorf("the key of one that failed is not free: %v", err)
	}
	if err := table.add(t.Context(), f, vm2); err != nil {
		t.Errorf("a guest asks for what it has: %v", err)
	}
	other := f
	other.Target = netip.AddrPortFrom(vm2, 81)
	if err := table.add(t.Context(), other, vm2); !errors.Is(err, usernet.ErrExists) {
		t.Errorf("a guest asks for the same with another target: %v, want ErrExists", err)
	}
	if err := table.end(); err != nil || o.count() != 0 {
		t.Errorf("at the end: %v, %d are open", err, o.count())
	}
	if err := table.add(t.Context(), f, nobody); !errors.Is(err, errEnding) {
		t.Errorf("after the end: %v", err)
	}
}

// While a forward is being opened, its key is taken and everybody else is served.
func TestForwardsOpening(t *testing.T) {
	o := &opener{gate: make(chan struct{}), began: make(chan struct{})}
	table := newForwards(o.open)
	f := tcp(t, ":8080", "192.168.127.2:80")
	done := make(chan error, 1)
	go func() { done <- table.add(context.Background(), f, nobody) }()
	<-o.began
	if err := table.add(t.Context(), f, nobody); !errors.Is(err, usernet.ErrExists) {
		t.Errorf("a second one: %v, want ErrExists", err)
	}
	if err := table.remove(f.Key, nobody); !errors.Is(err, usernet.ErrNotFound) {
		t.Errorf("end: %v, want ErrNotFound", err)
	}
	if got := table.all(); len(got) != 0 {
		t.Errorf("it is listed already: %v", got)
	}
	if err := table.end(); err != nil {
		t.Error(err)
	}
	close(o.gate)
	if err := <-done; !errors.Is(err, errEnding) {
		t.Errorf("opened after the end: %v", err)
	}
	if o.count() != 0 {
		t.Error("it is open after the end")
	}
}

func TestForwardsConcurrently(t *testing.T) {
	o := &opener{}
	table := newForwards(o.open)
	f := tcp(t, ":8080", "192.168.127.2:80")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				if err := table.add(t.Context(), f, nobody); err != nil && !errors.Is(err, usernet.ErrExists) {
					t.Error(err)
				}
				if err := table.remove(f.Key, vm2); err != nil && !errors.Is(err, usernet.ErrNotFound) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := table.end(); err != nil || o.count() != 0 {
		t.Errorf("at the end: %v, %d are open", err, o.count())
	}
}

func TestForwardsOfGuestsAreLimited(t *testing.T) {
	o := &opener{}
	table := newForwards(o.open)
	for i := range maxForwardsGuest {
		f := tcp(t, fmt.Sprintf("127.0.0.1:%d", i), "192.168.127.2:80")
		if err := table.add(t.Context(), f, vm2); err != nil {
			t.Fatal(err)
		}
	}
	f := tcp(t, ":8080", "192.168.127.2:80")
	if err := table.add(t.Context(), f, vm2); err == nil {
		t.Error("one more is opened")
	}
	g := tcp(t, ":8081", "192.168.127.3:80")
	if err := table.add(t.Context(), g, vm3); err != nil {
		t.Errorf("of another guest: %v", err)
	}
	if err := table.add(t.Context(), f, nobody); err != nil {
		t.Errorf("of the host: %v", err)
	}
	if err := table.remove(tcp(t, "127.0.0.1:7", "192.168.127.2:80").Key, vm2); err != nil {
		t.Fatal(err)
	}
	if err := table.add(t.Context(), tcp(t, ":8082", "192.168.127.2:80"), vm2); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
	if err := table.end(); err != nil || o.count() != 0 || len(table.guests) != 0 {
		t.Errorf("at the end: %v, %d are open, guests %v", err, o.count(), table.guests)
	}
}

func TestForwardsExpire(t *testing.T) {
	o := &opener{}
	table := newForwards(o.open)
	add := func(local string, guest netip.Addr) {
		t.Helper()
		if err := table.add(t.Context(), tcp(t, local, "192.168.127.2:80"), guest); err != nil {
			t.Fatal(err)
		}
	}
	add(":1", nobody)
	add(":2", vm2)
	add(":3", vm3)
	start := time.Now()
	there := []netip.Addr{vm2, vm3}
	check := func(after time.Duration, want ...string) {
		t.Helper()
		var got []string
		for _, f := range table.expire(start.Add(after), func(a netip.Addr) bool { return slices.Contains(there, a) }) {
			got = append(got, f.Local)
		}
		if !slices.Equal(got, want) {
			t.Errorf("after %v expire %q, want %q", after, got, want)
		}
	}
	check(time.Hour)
	there = there[:1]
	check(time.Hour + absence/2)
	check(time.Hour+absence, ":3")
	there = nil
	check(2*time.Hour, ":2")
	check(3 * time.Hour)
	if o.count() != 1 {
		t.Errorf("%d are open, want the host's", o.count())
	}
}

func TestHolder(t *testing.T) {
	table := newForwards((&opener{}).open)
	for _, local := range []string{":80", "127.0.0.1:81", "[::1]:82", "0.0.0.0:83", "localhost:84"} {
		if err := table.add(t.Context(), tcp(t, local, "192.168.127.2:80"), nobody); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		at   string
		held bool
	}{
		{"127.0.0.1:80", true}, {"[::]:80", true}, {"127.0.0.1:81", true}, {"127.0.0.2:81", false}, {"0.0.0.0:81", true},
		{"[::1]:82", true}, {"127.0.0.1:82", false}, {"10.0.0.1:83", true}, {"127.0.0.1:84", true}, {"127.0.0.1:85", false},
	} {
		if got := table.holder(gvproxy.TCP, netip.MustParseAddrPort(tt.at)); (got != "") != tt.held {
			t.Errorf("%s is held: %q, want %v", tt.at, got, tt.held)
		}
		if got := table.holder(gvproxy.UDP, netip.MustParseAddrPort(tt.at)); got != "" {
			t.Errorf("udp %s is held by %s", tt.at, got)
		}
	}
	if got := table.holder(gvproxy.TCP, netip.AddrPortFrom(nobody, 81)); got != "a forward from 127.0.0.1:81 to 192.168.127.2:80" {
		t.Errorf("holder %q", got)
	}
}
