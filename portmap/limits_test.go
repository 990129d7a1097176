package portmap

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

// Once, accepted sockets stayed open after a failed dial, and a few thousand clients of a dead container used up the
// descriptors of the process.
func TestTCPFailedDialsKeepNothing(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, tcpPort(1), Host{})
	before := countFiles(t)
	for range 2000 {
		c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(at(f, "127.0.0.1")))
		if err == nil {
			io.Copy(io.Discard, c)
			c.Close()
		}
	}
	eventually(t, "2000 refused", func() bool { return f.Stats() == Stats{Refused: 2000} })
	if after := countFiles(t); after > before+2 {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func countFiles(t testing.TB) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// stuck is a Dialer whose container never answers: the queue of its listener is full.
type stuck struct{ at netip.AddrPort }

func newStuck(t *testing.T) stuck {
	t.Helper()
	fd, err := splice.Socket(container)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, splice.Sockaddr(netip.AddrPortFrom(container, 0))), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	s := stuck{splice.AddrPort(sa)}
	waiting, err := Host{}.StartTCP(netip.AddrPort{}, s.at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(waiting) })
	return s
}

func (s stuck) StartTCP(client, _ netip.AddrPort) (int, error) { return Host{}.StartTCP(client, s.at) }

func (s stuck) DialUDP(client, target netip.AddrPort) (int, error) {
	return -1, errors.New("no such thing")
}

func TestTCPDialTimeout(t *testing.T) {
	m := newMapper(t)
	m.limits.dial = 20 * time.Millisecond
	f := mustPublish(t, m, tcpPort(1), newStuck(t))
	mustRefuse(t, at(f, "127.0.0.1"))
}

func TestTCPCloseEndsADial(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, tcpPort(1), newStuck(t))
	c := dial(t, at(f, "127.0.0.1"))
	eventually(t, "dialling", func() bool { return f.Stats().Active == 1 })
	closeSoon(t, f)
	mustReset(t, c)
}

func TestTCPTooMany(t *testing.T) {
	m := newMapper(t)
	m.limits.conns = 2
	f := mustPublish(t, m, tcpPort(serve(t, container, echo)), Host{})
	a, b := dial(t, at(f, "127.0.0.1")), dial(t, at(f, "::1"))
	exchange(t, a, "a")
	exchange(t, b, "b")
	mustRefuse(t, at(f, "127.0.0.1"))
	a.Close()
	eventually(t, "place again", func() bool { return f.Stats().Active == 1 })
	exchange(t, dial(t, at(f, "127.0.0.1")), "c")
	if got, want := f.Stats(), (Stats{Accepted: 3, Active: 2, Refused: 1}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestTCPSlowClientsHoldUpNobody(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, tcpPort(serve(t, container, echo)), Host{})
	// One that sends and never reads the echo, until nothing more goes in.
	deaf := dial(t, at(f, "127.0.0.1"))
	deaf.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	for b := make([]byte, 1<<20); ; {
		if _, err := deaf.Write(b); err != nil {
			break
		}
	}
	exchange(t, dial(t, at(f, "127.0.0.1")), "quick")
}

func TestTCPStuckDialHoldsUpNobody(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, tcpPort(serve(t, container, echo)), firstStuck{stuck: newStuck(t), once: new(sync.Once)})
	first := dial(t, at(f, "127.0.0.1"))
	eventually(t, "dialling", func() bool { return f.Stats().Active == 1 })
	exchange(t, dial(t, at(f, "127.0.0.1")), "hello")
	closeSoon(t, f)
	mustReset(t, first)
}

// firstStuck never reaches the container for its first client.
type firstStuck struct {
	Host
	stuck stuck
	once  *sync.Once
}

func (d firstStuck) StartTCP(client, target netip.AddrPort) (int, error) {
	first := false
	d.once.Do(func() { first = true })
	if first {
		return d.stuck.StartTCP(client, target)
	}
	return d.Host.StartTCP(client, target)
}

// told is a slog.Handler that passes messages on.
type told struct {
	slog.Handler
	messages chan string
}

func (h told) Enabled(context.Context, slog.Level) bool { return true }
func (h told) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h told) Handle(_ context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		h.messages <- r.Message
	}
	return nil
}

func TestTCPSurvivesALackOfDescriptors(t *testing.T) {
	m := newMapper(t)
	h := told{slog.DiscardHandler, make(chan string, 10)}
	m.log = slog.New(h)
	f := mustPublish(t, m, tcpPort(serve(t, container, echo)), Host{})

	// The relay must wait for a client by now: accept(2) without a descriptor fails even if there is none.
	exchange(t, dial(t, at(f, "127.0.0.1")), "hello")
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	restore := useUpFiles(t)
	err = unix.Connect(client, &unix.SockaddrInet4{Port: int(f.Port().HostPort), Addr: [4]byte{127, 0, 0, 1}})
	if err == nil {
		err = errors.New("it was silent")
		select {
		case <-h.messages:
			err = nil
		case <-time.After(patience):
		}
	}
	restore()
	file := os.NewFile(uintptr(client), "client")
	defer file.Close()
	if err != nil {
		t.Fatalf("without descriptors: %v", err)
	}
	c, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	exchange(t, c.(*net.TCPConn), "hello")
	if n := len(h.messages); n != 0 {
		t.Errorf("%d more warnings, want one for the whole time", n)
	}
}

// useUpFiles leaves the process no descriptors until the function it returns is called.
func useUpFiles(t *testing.T) (restore func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	var files []int
	for {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		files = append(files, fd)
	}
	return func() {
		// First the limit: while the descriptors come back one by one, the container would be short of them too.
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			t.Error(err)
		}
		for _, fd := range files {
			unix.Close(fd)
		}
	}
}
