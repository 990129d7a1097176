package gvproxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"
)

// serve serves the whole API of g on a unix socket until the test is over, and returns what dials it and what stops it.
func serve(t *testing.T, g Gateway) (dial func() *net.UnixConn, stop func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	log := slog.New(slog.DiscardHandler)
	go func() { served <- Serve(ctx, l, Full(g, log), log) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return func() *net.UnixConn {
		t.Helper()
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		return conn
	}, stop
}

func send(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, conn io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got[:n], err, want)
	}
}

// guest listens where the network would be, and gives g a way there.
func guest(t *testing.T, g *fake) *net.TCPListener {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	g.dial = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		if to != netip.MustParseAddrPort("192.168.127.2:22") {
			return nil, errors.New("dialled " + to.String())
		}
		return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	}
	return l
}

const tunnelRequest = "POST /tunnel?ip=192.168.127.2&port=22 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"

// A tunnel's first bytes are OK without any HTTP before them. What the client sends along with the request goes through,
// and each direction ends by itself.
func TestTunnel(t *testing.T) {
	g := newFake()
	l := guest(t, g)
	dial, _ := serve(t, g)
	conn := dial()
	send(t, conn, tunnelRequest+"early")
	expect(t, conn, "OK")
	far, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	expect(t, far, "early")
	send(t, far, "SSH-2.0")
	expect(t, conn, "SSH-2.0")
	send(t, conn, "late")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(far); err != nil || string(got) != "late" {
		t.Fatalf("guest read %q, %v", got, err)
	}
	send(t, far, "still")
	far.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "still" {
		t.Fatalf("client read %q, %v", got, err)
	}
}

// A guest that cannot be reached is an end behind OK.
func TestTunnelRefused(t *testing.T) {
	g := newFake()
	g.dial = func(context.Context, netip.AddrPort) (net.Conn, error) { return nil, errors.New("refused") }
	dial, _ := serve(t, g)
	conn := dial()
	send(t, conn, tunnelRequest)
	if got, err := io.ReadAll(conn); err != nil || string(got) != "OK" {
		t.Errorf("read %q, %v", got, err)
	}
}

// /connect has no answer: frames follow the request at once. gvproxy lost those that came in one segment with it.
func TestConnect(t *testing.T) {
	g := newFake()
	seen := make(chan string)
	g.attach = func(_ context.Context, conn net.Conn, early []byte) error {
		if _, ok := conn.(*net.UnixConn); !ok {
			t.Errorf("attached to %T: not the connection itself", conn)
		}
		seen <- string(early)
		late := make([]byte, 4)
		if _, err := io.ReadFull(conn, late); err != nil {
			t.Error(err)
		}
		seen <- string(late)
		_, err := io.WriteString(conn, "frames")
		return err
	}
	dial, _ := serve(t, g)
	conn := dial()
	send(t, conn, "POST /connect HTTP/1.1\r\nHost: x\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\n\r\n\x04\x00abcd")
	if got := <-seen; got != "\x04\x00abcd" {
		t.Errorf("attached with %q", got)
	}
	send(t, conn, "more")
	if got := <-seen; got != "more" {
		t.Errorf("then read %q", got)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "frames" {
		t.Errorf("read %q, %v", got, err)
	}
}

// Serve's end is the end of what was taken over from it, and it waits for that.
func TestServeJoins(t *testing.T) {
	g := newFake()
	l := guest(t, g)
	attached, left := make(chan struct{}), false
	g.attach = func(ctx context.Context, _ net.Conn, _ []byte) error {
		close(attached)
		<-ctx.Done()
		left = true
		return ctx.Err()
	}
	dial, stop := serve(t, g)
	vm, ssh, idle := dial(), dial(), dial()
	send(t, vm, "POST /connect HTTP/1.1\r\nHost: x\r\n\r\n")
	<-attached
	send(t, ssh, tunnelRequest)
	expect(t, ssh, "OK")
	far, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	send(t, idle, "GET /cam HTTP/1.1\r\nHost: x\r\n\r\n")
	expect(t, idle, "HTTP/1.1 200 OK\r\n")

	stop()
	if !left {
		t.Error("Serve did not wait for the VM")
	}
	for name, conn := range map[string]net.Conn{"vm": vm, "ssh": ssh, "idle": idle, "guest": far} {
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			t.Errorf("%s: still open", name)
		}
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// A listener that fails is an error, and ends what is still being served.
func TestServeFails(t *testing.T) {
	g := newFake()
	attached := make(chan struct{})
	g.attach = func(ctx context.Context, _ net.Conn, _ []byte) error {
		close(attached)
		<-ctx.Done()
		return ctx.Err()
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	served := make(chan error, 1)
	go func() { served <- Serve(t.Context(), l, Full(g, log), log) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	send(t, conn, "POST /connect HTTP/1.1\r\nHost: x\r\n\r\n")
	<-attached
	l.Close()
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		t.Errorf("served: %v", err)
	}
}
