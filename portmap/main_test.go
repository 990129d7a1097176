package portmap

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// container is the address that pretend containers have: one of the loopback's.
var container = netip.MustParseAddr("127.0.0.10")

const patience = 10 * time.Second

// newMapper returns a Mapper, and checks when the test has ended that nothing is left: ports, descriptors, goroutines.
func newMapper(t testing.TB) *Mapper {
	t.Helper()
	nettest.NoLeaks(t)
	before, pipes := goleak.IgnoreCurrent(), countPipes(t)
	t.Cleanup(func() {
		goleak.VerifyNone(t, before)
		// Empty pipes are kept for a moment.
		eventually(t, "pipes closed", func() bool {
			return countPipes(t) <= pipes
		})
	})
	m := New(slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if len(m.table.held) != 0 {
			t.Errorf("ports still held: %v", m.table.held)
		}
	})
	return m
}

func countPipes(t testing.TB) (n int) {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if target, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil && strings.HasPrefix(target, "pipe:") {
			n++
		}
	}
	return n
}

// mustPublish publishes p for a container with that port at the address container; it goes with the test.
func mustPublish(t testing.TB, m *Mapper, p usernet.Port, d Dialer) *Forward {
	t.Helper()
	f, err := m.Publish(Request{Owner: "endpoint test", Port: p, Addr4: container, Dialer: d})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeSoon(t, f) })
	return f
}

// closeSoon fails the test when Close does not end promptly.
func closeSoon(t testing.TB, f *Forward) {
	t.Helper()
	start := time.Now()
	if err := f.Close(); err != nil {
		t.Errorf("close %s: %v", f.Port(), err)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("close %s took %v", f.Port(), d)
	}
}

// at is the address of a published port at one of the host's addresses.
func at(f *Forward, host string) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(host), f.Port().HostPort)
}

// hostPort finds a number that is free at every address, both protocols.
func hostPort(t testing.TB) uint16 {
	t.Helper()
	for range 100 {
		ln, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		if pc, err := net.ListenPacket("udp", ln.Addr().String()); err == nil {
			pc.Close()
			return addrPort(ln.Addr()).Port()
		}
	}
	t.Fatal("no free port")
	return 0
}

// spy is a Dialer that tells which clients it was asked for.
type spy struct {
	Dialer
	clients chan netip.AddrPort
}

func newSpy() spy { return spy{Host{}, make(chan netip.AddrPort, 1024)} }

func (s spy) StartTCP(client, target netip.AddrPort) (int, error) {
	s.clients <- client
	return s.Dialer.StartTCP(client, target)
}

func (s spy) DialUDP(client, target netip.AddrPort) (int, error) {
	s.clients <- client
	return s.Dialer.DialUDP(client, target)
}

// in runs f in ns and returns what it made.
func in[T any](t testing.TB, ns *netns.NS, f func() (T, error)) T {
	t.Helper()
	var v T
	err := ns.Do(func() (err error) {
		v, err = f()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// eventually waits for something that has no event of its own: a counter, or the kernel.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// addrPort is the address of a TCP or UDP socket.
func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(interface{ AddrPort() netip.AddrPort }).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
