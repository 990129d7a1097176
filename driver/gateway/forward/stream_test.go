package forward

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
)

func TestTCP(t *testing.T) {
	for _, tt := range []struct{ name, local, dial, target string }{
		{"IPv4", "127.0.0.1", "127.0.0.1", "127.0.0.1"},
		{"IPv6", "::1", "::1", "::1"},
		{"everywhere, IPv4", "", "127.0.0.1", "::1"},
		{"everywhere, IPv6", "", "::1", "127.0.0.1"},
		{"name", "localhost", "127.0.0.1", "127.0.0.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			noLeaks(t)
			local := freePort(t, tt.local)
			n := newFake()
			f := start(t, n, gvproxy.TCP, local, machine(t, tt.target, shout), nil)
			conn := dial(t, "tcp", port(t, tt.dial, local))
			ask(t, conn, strings.Repeat("hello", 100_000))
			if got, want := <-n.clients, conn.LocalAddr().(*net.TCPAddr).AddrPort(); got != want {
				t.Errorf("client %s, want %s", got, want)
			}
			eventually(t, "the connection ends", func() bool { return f.Stats() == Stats{Accepted: 1} })
		})
	}
}

// TestTaken: clients of gvproxy look for these texts.
func TestTaken(t *testing.T) {
	noLeaks(t)
	for _, tt := range []struct {
		proto       gvproxy.Proto
		host, taken string
	}{
		{gvproxy.TCP, "127.0.0.1", "127.0.0.1"},
		{gvproxy.TCP, "::1", "::1"},
		{gvproxy.TCP, "", "127.0.0.1"},
		{gvproxy.UDP, "127.0.0.1", "127.0.0.1"},
		{gvproxy.UDP, "", "127.0.0.1"},
		{gvproxy.UDP, "", "::1"}, // IPv4 is bound first, and must be given back
	} {
		local := freePort(t, tt.host)
		var holder io.Closer
		var err error
		if tt.proto == gvproxy.TCP {
			holder, err = net.Listen("tcp", port(t, tt.taken, local))
		} else {
			holder, err = net.ListenPacket("udp", port(t, tt.taken, local))
		}
		if err != nil {
			t.Fatal(err)
		}
		spec, err := gvproxy.ParseForward(tt.proto, local, "127.0.0.1:1")
		if err != nil {
			t.Fatal(err)
		}
		_, err = Open(t.Context(), spec, newFake(), slog.New(slog.DiscardHandler))
		if want := "listen " + string(tt.proto) + " " + local + ": bind: address already in use"; err == nil || err.Error() != want {
			t.Errorf("error %q, want %q", err, want)
		}
		holder.Close()
		start(t, newFake(), tt.proto, local, "127.0.0.1:1", nil)
	}
}

func TestOpenErrors(t *testing.T) {
	noLeaks(t)
	for _, tt := range []struct {
		proto       gvproxy.Proto
		local, want string
	}{
		{gvproxy.TCP, "127.0.0.1", "listen tcp: address 127.0.0.1: missing port in address"},
		{gvproxy.UDP, "127.0.0.1", "listen udp: address 127.0.0.1: missing port in address"},
		{gvproxy.TCP, "127.0.0.1:70000", "listen tcp: address 70000: invalid port"},
		{gvproxy.UDP, ":70000", "listen udp: address 70000: invalid port"},
		{gvproxy.TCP, "192.0.2.1:8080", "listen tcp 192.0.2.1:8080: bind: cannot assign requested address"},
		{gvproxy.UDP, "192.0.2.1:8080", "listen udp 192.0.2.1:8080: bind: cannot assign requested address"},
		{"sctp", ":80", "unknown protocol sctp"},
	} {
		f, err := Open(t.Context(), gvproxy.Forward{Key: gvproxy.Key{Proto: tt.proto, Local: tt.local}}, newFake(), slog.New(slog.DiscardHandler))
		if err == nil {
			f.Close()
		}
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s %s: error %v, want %s", tt.proto, tt.local, err, tt.want)
		}
	}
}

func TestRefused(t *testing.T) {
	noLeaks(t)
	local := freePort(t, "127.0.0.1")
	f := start(t, newFake(), gvproxy.TCP, local, freePort(t, "127.0.0.1"), nil)
	turnedAway(t, "tcp", local)
	eventually(t, "the failure is counted", func() bool { return f.Stats() == Stats{Accepted: 1, Failed: 1} })
}

// TestResets: what a client or a machine resets is no end of file to the other one.
func TestResets(t *testing.T) {
	noLeaks(t)
	seen := make(chan error, 1)
	target := machine(t, "127.0.0.1", func(conn net.Conn) {
		text := make([]byte, 1)
		io.ReadFull(conn, text)
		conn.Write(text)
		if text[0] == 'r' {
			reset(conn)
			return
		}
		_, err := conn.Read(text)
		seen <- err
	})
	local := freePort(t, "127.0.0.1")
	start(t, newFake(), gvproxy.TCP, local, target, nil)
	conn := dial(t, "tcp", local)
	exchange(t, conn, "r")
	gone(t, conn, false)

	conn = dial(t, "tcp", local)
	exchange(t, conn, "c")
	reset(conn)
	if err := <-seen; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the machine sees %v, want a reset", err)
	}
}

// TestHoles: connections to where nobody answers hold up no others.
func TestHoles(t *testing.T) {
	noLeaks(t)
	n := newFake()
	n.holes = 10
	local := freePort(t, "127.0.0.1")
	f := start(t, n, gvproxy.TCP, local, machine(t, "127.0.0.1", shout), nil)
	for range 10 {
		dial(t, "tcp", local)
		<-n.clients
	}
	ask(t, dial(t, "tcp", local), "hello")
	eventually(t, "ten wait", func() bool { return f.Stats() == Stats{Active: 10, Accepted: 11} })
}

func TestLimit(t *testing.T) {
	noLeaks(t)
	local := freePort(t, "127.0.0.1")
	f := start(t, newFake(), gvproxy.TCP, local, machine(t, "127.0.0.1", echo), func(l *limits) { l.conns = 2 })
	first, second := dial(t, "tcp", local), dial(t, "tcp", local)
	exchange(t, first, "first")
	exchange(t, second, "second")
	turnedAway(t, "tcp", local)
	if got, want := f.Stats(), (Stats{Active: 2, Accepted: 2, Refused: 1}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
	first.Close()
	eventually(t, "the first ends", func() bool { return f.Stats().Active == 1 })
	exchange(t, dial(t, "tcp", local), "third")
	exchange(t, second, "second")
}

func TestCloseEndsConnections(t *testing.T) {
	noLeaks(t)
	n := newFake()
	local := freePort(t, "127.0.0.1")
	f := start(t, n, gvproxy.TCP, local, machine(t, "127.0.0.1", echo), nil)
	conn := dial(t, "tcp", local)
	exchange(t, conn, "hello")
	n.change(func(n *fake) { n.holes = 1 })
	<-n.clients
	waiting := dial(t, "tcp", local)
	<-n.clients
	closeSoon(t, f)
	gone(t, conn, true)
	gone(t, waiting, true)
	if conn, err := net.Dial("tcp", local); err == nil {
		conn.Close()
		t.Error("it still listens")
	}
	start(t, n, gvproxy.TCP, local, machine(t, "127.0.0.1", echo), nil)
}

func TestManyAtOnce(t *testing.T) {
	noLeaks(t)
	local := freePort(t, "127.0.0.1")
	f := start(t, newFake(), gvproxy.TCP, local, machine(t, "127.0.0.1", shout), nil)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				conn, err := net.Dial("tcp", local)
				if err != nil {
					t.Error(err)
					return
				}
				conn.SetDeadline(time.Now().Add(patience))
				io.WriteString(conn, "hello")
				conn.(*net.TCPConn).CloseWrite()
				if text, err := io.ReadAll(conn); err != nil || string(text) != "got hello" {
					t.Errorf("answer %q, %v", text, err)
				}
				conn.Close()
			}
		})
	}
	wg.Wait()
	eventually(t, "all end", func() bool { return f.Stats() == Stats{Accepted: 160} })
}

// exhausted is a listener without descriptors.
type exhausted struct {
	tries  atomic.Int64
	closed chan struct{}
}

func (l *exhausted) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
		l.tries.Add(1)
		return nil, syscall.EMFILE
	}
}
func (l *exhausted) Close() error   { close(l.closed); return nil }
func (l *exhausted) Addr() net.Addr { return &net.TCPAddr{} }

// TestNoDescriptors: Accept fails at once, and again, for as long as there is no descriptor.
func TestNoDescriptors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &exhausted{closed: make(chan struct{})}
		var log strings.Builder
		ctx, stop := context.WithCancel(t.Context())
		f := &Forward{log: slog.New(slog.NewTextHandler(&log, nil)), limits: standard, shut: l.Close, stop: stop}
		f.wg.Go(func() {
			f.accept(ctx, l, func(context.Context, net.Conn, netip.AddrPort) error { return nil })
		})
		time.Sleep(time.Minute)
		if n := l.tries.Load(); n < 60 || n > 80 {
			t.Errorf("%d tries in a minute, want one a second", n)
		}
		closeSoon(t, f)
		if n := strings.Count(log.String(), "level=WARN"); n != 1 {
			t.Errorf("%d warnings, want 1: %s", n, log.String())
		}
	})
}
