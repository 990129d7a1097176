package vsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestUnix(t *testing.T) {
	noLeaks(t)
	url, path := socketURL(t)
	l := listen(t, url)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", st.Mode(), err)
	}
	echo(t, l)
	conn := dial(t, url)
	if _, ok := conn.(*net.UnixConn); !ok {
		t.Errorf("the connection is a %T: splice(2) wants a *net.UnixConn", conn)
	}
	if cid, ok := PeerCID(conn); ok {
		t.Errorf("a unix socket has the peer CID %d", cid)
	}
	talk(t, conn)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v, want that the file is gone", err)
	}
}

// stale leaves a socket that nobody listens on, as a killed process does.
func stale(t testing.TB, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestUnixTakesOver(t *testing.T) {
	noLeaks(t)
	url, path := socketURL(t)
	stale(t, path)
	echo(t, listen(t, url))
	if _, err := Listen(mustParse(t, url)); !errors.Is(err, ErrInUse) {
		t.Errorf("a second listener: %v, want ErrInUse", err)
	}
	// The attempt came as a connection, which the listener has served by now or will.
	talk(t, dial(t, url))
}

// TestUnixTakesOverOnce lets many find the same stale socket.
func TestUnixTakesOverOnce(t *testing.T) {
	noLeaks(t)
	url, path := socketURL(t)
	stale(t, path)
	a := mustParse(t, url)
	var (
		wg      sync.WaitGroup
		winners = make(chan net.Listener, 8)
	)
	for range cap(winners) {
		wg.Go(func() {
			l, err := Listen(a)
			if err == nil {
				winners <- l
			} else if !errors.Is(err, ErrInUse) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(winners) != 1 {
		t.Errorf("%d listeners on one path", len(winners))
	}
	close(winners)
	for l := range winners {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestUnixErrors(t *testing.T) {
	noLeaks(t)
	url, path := socketURL(t)
	if _, err := Dial(soon(t), mustParse(t, url)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("dial without a file: %v", err)
	}
	stale(t, path)
	_, err := Dial(soon(t), mustParse(t, url))
	if want := "dial " + url + ": connect: connection refused"; err == nil || err.Error() != want {
		t.Errorf("dial without a listener: %v, want %s", err, want)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v is no ECONNREFUSED", err)
	}

	file := path + ".txt"
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(mustParse(t, "unix://"+file)); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("listen on a file: %v", err)
	}
	if _, err := Listen(mustParse(t, "unix://"+file+"/below")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("listen below a file: %v", err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file afterwards: %q, %v", text, err)
	}
}

// TestUnixBusy fills a listener's backlog: connect(2) that does not block returns EAGAIN then, which is no reason to
// give up.
func TestUnixBusy(t *testing.T) {
	noLeaks(t)
	url, path := socketURL(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	first := dial(t, url) // there is room for one
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, mustParse(t, url)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial a full backlog: %v, want the deadline", err)
	}
	if _, err := Listen(mustParse(t, url)); !errors.Is(err, ErrInUse) {
		t.Errorf("listen on a full backlog: %v, want ErrInUse", err)
	}

	done := make(chan error, 1)
	go func() {
		conn, err := Dial(soon(t), mustParse(t, url))
		if err == nil {
			err = conn.Close()
		}
		done <- err
	}()
	for range 2 {
		conn, _, err := unix.Accept(fd)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(conn)
	}
	if err := <-done; err != nil {
		t.Errorf("dial when there is room again: %v", err)
	}
	first.Close()
}

func TestTCP(t *testing.T) {
	noLeaks(t)
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		l := listen(t, "tcp://"+host+":0")
		echo(t, l)
		conn := dial(t, fmt.Sprintf("tcp://%s", l.Addr()))
		if _, ok := conn.(*net.TCPConn); !ok {
			t.Errorf("the connection is a %T: splice(2) wants a *net.TCPConn", conn)
		}
		talk(t, conn)
	}
	for _, url := range []string{"tcp://:80", "tcp://127.0.0.1:0"} {
		if _, err := Dial(soon(t), mustParse(t, url)); err == nil || !strings.Contains(err.Error(), "a host and a port") {
			t.Errorf("dial %s: %v", url, err)
		}
	}
}

// TestUnsupported: what another system has is no riddle here.
func TestUnsupported(t *testing.T) {
	a := mustParse(t, "hvsock://wildcard/1024")
	_, err := Listen(a)
	if want := "listen on hvsock://wildcard/1024: hvsock is there on windows only: unsupported operation"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("%v is no ErrUnsupported", err)
	}
	if _, err := Dial(soon(t), a); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("dial: %v", err)
	}
	r, _ := a.Registration("usernet")
	if err := errors.Join(r.Install(), r.Remove()); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("registry: %v", err)
	}
	if _, err := Listen(Addr{}); err == nil {
		t.Error("listen nowhere: no error")
	}
}
