package publish

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock/proxy"
)

// within bounds everything that a test waits for.
const within = 20 * time.Second

func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for a state that nothing tells of.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func testLog(t testing.TB) *slog.Logger {
	if _, ok := t.(*testing.B); ok {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// gateway is a Server behind a unix socket, which can be killed and started again.
type gateway struct {
	*Server
	t    testing.TB
	path string
	cfg  ServerConfig
	raw  bool // its socket ends one direction alone, as AF_VSOCK and TCP do
	stop func()
}

func newGateway(t testing.TB, cfg ServerConfig) *gateway {
	t.Helper()
	if _, ok := t.(*testing.T); ok { // a benchmark has goroutines around it
		t.Cleanup(func() { goleak.VerifyNone(t) })
	}
	cfg.Log = testLog(t)
	g := &gateway{t: t, path: filepath.Join(t.TempDir(), "gateway.sock"), cfg: cfg, raw: true}
	g.start()
	t.Cleanup(func() { g.stop() })
	return g
}

// newDeviceGateway is one behind a hypervisor's socket.
func newDeviceGateway(t testing.TB, cfg ServerConfig) *gateway {
	t.Helper()
	g := newGateway(t, cfg)
	g.stop()
	os.Remove(g.path)
	g.raw = false
	g.start()
	return g
}

func (g *gateway) start() {
	g.t.Helper()
	l, err := net.Listen("unix", g.path)
	if err != nil {
		g.t.Fatal(err)
	}
	g.Server = NewServer(g.cfg)
	if g.raw {
		g.Server.endsOneWay = func(net.Conn) bool { return true }
	}
	srv := &http.Server{Handler: g.Server}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { srv.Serve(l) })
	s := g.Server
	running.Go(func() {
		if err := s.Run(ctx); err != nil {
			g.t.Error(err)
		}
	})
	g.stop = sync.OnceFunc(func() {
		srv.Close()
		cancel()
		running.Wait()
	})
}

func (g *gateway) dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", g.path)
}

// guest runs a Client.
func (g *gateway) guest(dial func(context.Context) (net.Conn, error)) (c *Client, stop func()) {
	g.t.Helper()
	if dial == nil {
		dial = g.dial
	}
	c = NewClient(ClientConfig{Dial: dial, Name: "unix:gateway", Log: testLog(g.t)})
	c.retry = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := c.Run(ctx); err != nil {
			g.t.Error(err)
		}
	})
	stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	g.t.Cleanup(stop)
	return c, stop
}

// server is a handler that answers every connection with its header, and then with what it hears, until the end of that.
type server struct {
	t       testing.TB
	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup
}

func newServer(t testing.TB) *server {
	s := &server{t: t}
	t.Cleanup(func() { // the guest may still hand over a connection whose client has gone
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		s.running.Wait()
	})
	return s
}

func greeting(h proxy.Header) string { return fmt.Sprintf("%s to %s\n", h.Client, h.Target) }

func (s *server) handle(h proxy.Header, conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		conn.Close()
		return
	}
	s.running.Go(func() {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(within))
		if h.Datagram {
			r, b := bufio.NewReader(conn), make([]byte, MaxDatagram)
			for {
				n, err := ReadDatagram(r, b)
				if err != nil {
					return
				}
				conn.Write(AppendDatagram(nil, append([]byte(greeting(h)), b[:n]...)))
			}
		}
		io.WriteString(conn, greeting(h))
		if _, err := io.Copy(conn, conn); err == nil {
			closeWrite(conn)
		}
	})
}

func tcp(port uint16) usernet.Port { return usernet.Port{Proto: usernet.TCP, HostPort: port} }

func udp(port uint16) usernet.Port { return usernet.Port{Proto: usernet.UDP, HostPort: port} }

func mustPublish(t testing.TB, c *Client, p usernet.Port, h Handler) *Published {
	t.Helper()
	w, err := c.Publish(soon(t), p, h)
	if err != nil {
		t.Fatalf("publish %s: %v", p, err)
	}
	return w
}

func dialTCP(t testing.TB, at string) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", at, within)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(within))
	return conn.(*net.TCPConn)
}

// talk asks the port for an echo and returns the greeting.
func talk(t testing.TB, at, text string) string {
	t.Helper()
	conn := dialTCP(t, at)
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	first, rest, _ := strings.Cut(string(all), "\n")
	if rest != text {
		t.Fatalf("%s echoed %d bytes of %d", at, len(rest), len(text))
	}
	if want := conn.LocalAddr().String() + " to " + conn.RemoteAddr().String(); first != want {
		t.Errorf("greeting %q, want %q", first, want)
	}
	return first
}

func TestTCP(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	s := newServer(t)
	w := mustPublish(t, c, tcp(8080), s.handle)
	if w.HostPort() != 8080 || w.Err() != nil {
		t.Errorf("port %d, %v", w.HostPort(), w.Err())
	}
	talk(t, "127.0.0.1:8080", "hello")
	talk(t, "[::1]:8080", strings.Repeat("bulk", 1<<20))
	ports := g.Ports()
	if len(ports) != 1 || ports[0].Port != 8080 || ports[0].Accepted != 2 || ports[0].Addr.IsValid() || ports[0].Guest != "a guest" {
		t.Errorf("ports: %+v", ports)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("tcp", "127.0.0.1:8080"); err == nil {
		conn.Close()
		t.Error("the port is open after Close")
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if len(g.Ports()) != 0 {
		t.Errorf("ports: %+v", g.Ports())
	}
}

func TestAddresses(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	one, all := newServer(t), newServer(t)
	p := tcp(8081)
	p.HostIP = netip.MustParseAddr("127.0.0.1")
	mustPublish(t, c, p, one.handle)
	if conn, err := net.Dial("tcp", "127.0.0.2:8081"); err == nil {
		conn.Close()
		t.Error("127.0.0.2 is open as well")
	}
	talk(t, "127.0.0.1:8081", "x")

	six := tcp(8081)
	six.HostIP = netip.MustParseAddr("::")
	mustPublish(t, c, six, all.handle)
	talk(t, "[::1]:8081", "x")

	four := tcp(8082)
	four.IPv4Only = true
	mustPublish(t, c, four, all.handle)
	talk(t, "127.0.0.3:8082", "x")
	if conn, err := net.Dial("tcp", "[::1]:8082"); err == nil {
		conn.Close()
		t.Error("an IPv4 port is open at ::1")
	}
}

func TestConflict(t *testing.T) {
	g := newGateway(t, ServerConfig{
		Guest: func(*http.Request) string { return "vm1" },
		Holder: func(proto usernet.Proto, at netip.AddrPort) string {
			return map[uint16]string{9003: "a forward has it"}[at.Port()]
		},
	})
	c, _ := g.guest(nil)
	other, _ := g.guest(nil)
	s := newServer(t)
	l, err := net.Listen("tcp4", "127.0.0.1:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mustPublish(t, other, tcp(9001), s.handle)
	mustPublish(t, c, tcp(9002), s.handle)
	loop := netip.MustParseAddr("127.0.0.1")
	for _, row := range []struct {
		port usernet.Port
		want string
	}{
		{tcp(9000), "port 9000 is taken on the host: listen tcp4 0.0.0.0:9000: bind: address already in use"},
		{usernet.Port{Proto: usernet.TCP, HostIP: loop, HostPort: 9000}, "port 9000 is taken on the host: listen tcp4 127.0.0.1:9000: bind: address already in use"},
		{tcp(9001), "port 9001 is taken on the host: vm1 has published it"},
		{usernet.Port{Proto: usernet.TCP, HostIP: loop, HostPort: 9001}, "port 9001 is taken on the host: vm1 has published it"},
		{tcp(9002), "port 9002 is taken on the host: vm1 has published it"},
		{tcp(9003), "port 9003 is taken on the host: a forward has it"},
		{usernet.Port{Proto: usernet.TCP, HostPort: 9000, HostPortEnd: 9001}, "no port of 9000-9001 is free on the host: port 9000 is taken on the host: listen tcp4 0.0.0.0:9000: bind: address already in use"},
	} {
		_, err := c.Publish(soon(t), row.port, s.handle)
		if err == nil || err.Error() != row.want || !errors.Is(err, usernet.ErrPortTaken) {
			t.Errorf("%s: %v (taken: %v), want %q", row.port, err, errors.Is(err, usernet.ErrPortTaken), row.want)
		}
	}
	for _, row := range []struct {
		port usernet.Port
		want string
	}{
		{usernet.Port{Proto: usernet.TCP, HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 80}, "listen tcp4 192.0.2.1:80: bind: cannot assign requested address"},
		{usernet.Port{Proto: usernet.SCTP, HostPort: 80}, `invalid: protocol "sctp"`},
		{usernet.Port{Proto: usernet.TCP, HostPort: 1000, HostPortEnd: 60000}, "invalid: a range of more than 4096 ports"},
		{usernet.Port{Proto: usernet.TCP, HostIP: netip.MustParseAddr("224.0.0.1"), HostPort: 80}, "invalid: 224.0.0.1 is a multicast address"},
	} {
		_, err := c.Publish(soon(t), row.port, s.handle)
		if err == nil || err.Error() != row.want || errors.Is(err, usernet.ErrPortTaken) {
			t.Errorf("%s: %v, want %q", row.port, err, row.want)
		}
	}
	w := mustPublish(t, c, usernet.Port{Proto: usernet.TCP, HostPort: 9000, HostPortEnd: 9005}, s.handle)
	if w.HostPort() != 9004 {
		t.Errorf("the first free port of the range is %d, want 9004", w.HostPort())
	}
	talk(t, "127.0.0.1:9004", "x")
	free := mustPublish(t, c, tcp(0), s.handle)
	talk(t, fmt.Sprintf("[::1]:%d", free.HostPort()), "x")
	if n := len(g.Ports()); n != 4 {
		t.Errorf("%d ports, want 4: what was refused must leave nothing", n)
	}
}
