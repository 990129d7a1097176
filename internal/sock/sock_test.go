package sock

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// actAs makes the test binary play the process that systemd starts.
const actAs = "USERNET_SOCK_TEST"

func TestMain(m *testing.M) {
	if os.Getenv(actAs) == "activated" {
		os.Exit(activated())
	}
	goleak.VerifyTestMain(m)
}

func TestListen(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0)) // the mode must not depend on it
	path := filepath.Join(t.TempDir(), "a", "b", "s.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := st.Mode().Perm(); got != 0o600 {
		t.Errorf("mode %o, want 600", got)
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) {
		t.Errorf("second Listen = %v, want ErrInUse with the path", err)
	}
	answers(t, l, path)
	l.Close()
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v, want no file", err)
	}
}

// A daemon that was killed leaves its socket behind.
func TestListenStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	stale(t, path)
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answers(t, l, path)
}

// Of many daemons that start at once on a stale socket, one gets it, and is still reachable when the others gave up.
func TestListenRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	stale(t, path)
	listeners := make([]net.Listener, 16)
	var wg sync.WaitGroup
	for i := range listeners {
		wg.Go(func() {
			l, err := Listen(path)
			if err != nil && !errors.Is(err, ErrInUse) {
				t.Error(err)
			}
			listeners[i] = l
		})
	}
	wg.Wait()
	var winner net.Listener
	for _, l := range listeners {
		if l == nil {
			continue
		}
		defer l.Close()
		if winner != nil {
			t.Fatal("two listen")
		}
		winner = l
	}
	if winner == nil {
		t.Fatal("none listens")
	}
	// The losers' probes wait in the backlog; drain them.
	for range len(listeners) - 1 {
		c, err := winner.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	answers(t, winner, path)
}

func TestListenRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("Listen on a file = %v", err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file was touched: %q, %v", text, err)
	}
	if _, err := Listen(filepath.Join(file, "s.sock")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("Listen below a file = %v, want ENOTDIR", err)
	}
	if _, err := Listen(filepath.Join(dir, strings.Repeat("x", 108))); err == nil || !strings.Contains(err.Error(), "longer than 107") {
		t.Errorf("Listen on a long path = %v", err)
	}
	packet, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "d.sock"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer packet.Close()
	if _, err := Listen(filepath.Join(dir, "d.sock")); !errors.Is(err, ErrInUse) {
		t.Errorf("Listen on a datagram socket = %v, want ErrInUse", err)
	}
}

// systemd passes sockets as descriptors from 3 on, with names, to the process whose ID it names.
func TestInherit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plugin.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other := filepath.Join(t.TempDir(), "control.sock")

	// The shell is there because LISTEN_PID must be known before the exec.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), actAs+"=activated", "LISTEN_FDS=1", "LISTEN_FDNAMES=plugin", "TEST_OTHER="+other)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	ready := make([]byte, 1)
	if _, err := io.ReadFull(out, ready); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, other} {
		c, err := net.Dial("unix", p)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		c.Close()
		if err != nil || string(got) != "hello" {
			t.Errorf("%s answers %q, %v", p, got, err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("systemd's socket was removed: %v", err)
	}
}

// activated greets one client on the inherited socket and one on its own.
func activated() int {
	in, err := Inherit()
	if err != nil {
		println(err.Error())
		return 1
	}
	if os.Getenv("LISTEN_FDS") != "" {
		println("LISTEN_FDS is still set")
		return 1
	}
	for i, l := range []struct{ name, path string }{{"plugin", "/nowhere/at/all"}, {"control", os.Getenv("TEST_OTHER")}} {
		l, err := in.Listen(l.name, l.path)
		if err != nil {
			println(strconv.Itoa(i), err.Error())
			return 1
		}
		defer l.Close()
		if i == 0 {
			defer greet(l)()
			continue
		}
		os.Stdout.WriteString(".")
		greet(l)()
	}
	return 0
}

func greet(l net.Listener) (join func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err == nil {
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	return func() { <-done }
}

func TestInheritNothing(t *testing.T) {
	in, err := Inherit()
	if err != nil || len(in) != 0 {
		t.Fatalf("Inherit() = %v, %v", in, err)
	}
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := Inherited(nil).Listen("plugin", path)
	if err != nil {
		t.Fatal(err)
	}
	if got := l.Addr().String(); got != path {
		t.Errorf("listens on %s, want %s", got, path)
	}
	in = Inherited{"extra": l}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v, want net.ErrClosed", err)
	}
}

// stale leaves a socket at path that nobody listens on.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func answers(t *testing.T, l net.Listener, path string) {
	t.Helper()
	// A probe of an earlier Listen may be first in the backlog.
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, err = io.WriteString(c, "hello")
			c.Close()
			if err == nil {
				return
			}
		}
	}()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
		t.Errorf("answer %q, %v", got, err)
	}
	<-done
}
