package load

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// startAgent runs an agent that serves at a port of the loopback until the test ends.
func startAgent(t *testing.T, port uint16) (*Remote, netip.AddrPort) {
	t.Helper()
	control := filepath.Join(t.TempDir(), "control")
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, control, addr) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		r, err := Dial(t.Context(), control)
		if err == nil {
			t.Cleanup(func() { r.Close() })
			return r, addr
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func loopback(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

func TestLoads(t *testing.T) {
	nettest.NoLeaks(t)
	loopback(t)
	client, _ := startAgent(t, 9001)
	server, addr := startAgent(t, 9000)
	for i, j := range []Job{
		{Kind: TCPUp, Streams: 1}, {Kind: TCPUp, Streams: 8}, {Kind: TCPDown, Streams: 1}, {Kind: TCPDown, Streams: 8},
		{Kind: TCPEcho}, {Kind: TCPConnect, Streams: 1}, {Kind: TCPConnect, Streams: 8},
		{Kind: UDPUp}, {Kind: UDPDown}, {Kind: UDPExchange, Streams: 1}, {Kind: UDPExchange, Streams: 16}, {Kind: Ping},
	} {
		j.ID, j.Addr, j.Length = uint64(i), addr, 50*time.Millisecond
		r, err := client.Drive(t.Context(), j)
		if err != nil {
			t.Error(err)
			continue
		}
		switch j.Kind {
		case TCPUp, UDPUp:
			if r, err = server.Received(t.Context(), j); err != nil {
				t.Errorf("%s: %v", j.Kind, err)
			}
			fallthrough
		case TCPDown, UDPDown:
			// What a loopback carries at the very least, and what none does.
			if g := r.Gbits(); g < 0.01 || g > 10_000 || r.Elapsed != j.Length {
				t.Errorf("%s, %d streams: %v Gbit/s in %v", j.Kind, j.Streams, g, r.Elapsed)
			}
		case TCPConnect:
			if r.Done == 0 || r.Elapsed < j.Length {
				t.Errorf("%s: %+v", j.Kind, r)
			}
		default:
			if r.Done == 0 || r.P50 <= 0 || r.P99 < r.P50 || r.Elapsed < j.Length {
				t.Errorf("%s: %+v", j.Kind, r)
			}
		}
	}
}

func TestNobodyServes(t *testing.T) {
	nettest.NoLeaks(t)
	loopback(t)
	client, addr := startAgent(t, 9002)
	addr = netip.AddrPortFrom(addr.Addr(), 1)
	for _, k := range []Kind{TCPUp, TCPDown, TCPEcho, TCPConnect, UDPDown, UDPExchange, "no such"} {
		if r, err := client.Drive(t.Context(), Job{Kind: k, Addr: addr, Length: 10 * time.Millisecond}); err == nil {
			t.Errorf("%s: %+v, no error", k, r)
		}
	}
}

func TestHold(t *testing.T) {
	nettest.NoLeaks(t)
	loopback(t)
	client, _ := startAgent(t, 9003)
	_, addr := startAgent(t, 9004)
	r, err := client.Hold(t.Context(), Job{Addr: addr, Streams: 100, Length: 20 * time.Second})
	if err != nil || r.Done != 100 {
		t.Fatalf("%+v, %v", r, err)
	}
	if got := established(t, addr); got != 200 { // both ends of each
		t.Errorf("%d sockets are connected, want 200", got)
	}
	if err := client.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := established(t, addr); got != 0 {
		t.Errorf("%d sockets are connected after the release", got)
	}
	nobody := netip.AddrPortFrom(addr.Addr(), 1)
	r, err = client.Hold(t.Context(), Job{Addr: nobody, Streams: 100, Length: 20 * time.Second})
	if err != nil || r.Done != 0 || r.Failed == 0 || !strings.Contains(r.Failure, "refused") {
		t.Errorf("where nobody listens: %+v, %v", r, err)
	}
}

// established counts the connected sockets of both ends of a port.
func established(t *testing.T, addr netip.AddrPort) (n int) {
	t.Helper()
	socks, err := netlink.SocketDiagTCP(2) // AF_INET
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range socks {
		if s.State == netlink.TCP_ESTABLISHED && (s.ID.SourcePort == addr.Port() || s.ID.DestinationPort == addr.Port()) {
			n++
		}
	}
	return n
}

func TestPercentile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for _, tt := range []struct {
		sorted []time.Duration
		p      int
		want   time.Duration
	}{
		{nil, 50, 0},
		{[]time.Duration{7}, 50, 7},
		{[]time.Duration{7}, 99, 7},
		{[]time.Duration{1, 2}, 50, 1},
		{[]time.Duration{1, 2, 3}, 50, 2},
		{hundred, 50, 50},
		{hundred, 99, 99},
		{hundred[:99], 99, 99},
	} {
		if got := percentile(tt.sorted, tt.p); got != tt.want {
			t.Errorf("percentile %d of %d values = %d, want %d", tt.p, len(tt.sorted), got, tt.want)
		}
	}
}

// The window of a tally begins with its first byte, and what comes later is not in it.
func TestTallyWindow(t *testing.T) {
	var ts tallies
	if _, err := ts.wait(1, 0); err == nil {
		t.Error("nothing arrived, no error")
	}
	w := ts.of(1, 20*time.Millisecond)
	if !w.add(5) || ts.of(1, time.Hour) != w {
		t.Error("the window is closed at once or is another at the second call")
	}
	time.Sleep(time.Until(w.end))
	if w.add(7) {
		t.Error("the window is open after its end")
	}
	r, err := ts.wait(1, 0)
	if want := (Result{Bytes: 5, Done: 1, Elapsed: 20 * time.Millisecond}); err != nil || r != want {
		t.Errorf("%+v, %v, want %+v", r, err, want)
	}
}
