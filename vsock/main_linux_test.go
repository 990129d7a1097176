package vsock

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) {
	if os.Getenv(asChild) != "" {
		os.Exit(child())
	}
	os.Exit(nettest.Main(m))
}

// halves is what every connection has.
type halves interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// noLeaks checks goroutines and descriptors when the test ends.
func noLeaks(t *testing.T) {
	t.Helper()
	nettest.NoLeaks(t)
	t.Cleanup(func() { goleak.VerifyNone(t) })
}

// soon is a context for what takes no time.
func soon(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func dial(t testing.TB, url string) net.Conn {
	t.Helper()
	conn, err := Dial(soon(t), mustParse(t, url))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func listen(t testing.TB, url string) net.Listener {
	t.Helper()
	l, err := Listen(mustParse(t, url))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// echo accepts connections of l one after the other, says hello, and returns what it hears up to the end.
func echo(t testing.TB, l net.Listener) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- serveEcho(l) }()
	t.Cleanup(func() {
		l.Close()
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("echo: %v", err)
		}
	})
}

func serveEcho(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		io.WriteString(conn, "hello ")
		io.Copy(conn, conn)
		conn.(halves).CloseWrite()
		conn.Close()
	}
}

// talk expects an echo at the other end of conn, whole up to the half close.
func talk(t testing.TB, conn net.Conn) {
	t.Helper()
	if _, err := io.WriteString(conn, "world"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(halves).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != "hello world" {
		t.Fatalf("got %q, %v, want hello world", got, err)
	}
}

// socketURL is the URL of a unix socket in a directory of the test's own.
func socketURL(t testing.TB) (url, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "x.sock")
	return "unix://" + path, path
}
