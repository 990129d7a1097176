// Package gvproxy_test holds driver/gvproxy to what a real gvproxy does: the same requests, command lines and files go to both,
// and their answers are compared. The differences that are meant are in the tables, and have to be there.
//
// USERNET_TEST_STRICT makes a missing gvproxy a failure; test/setup.sh bench builds it.
package gvproxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// patience is how long anything may take on a busy machine.
const patience = time.Minute

// program is the path of the real gvproxy.
func program(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("USERNET_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/usernet-test"
	}
	path := filepath.Join(cache, "peers/gvproxy")
	if _, err := os.Stat(path); err != nil {
		err = fmt.Errorf("gvproxy is not there; test/setup.sh bench builds it: %w", err)
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return path
}

// peer is a running gvproxy.
type peer struct {
	api    string // the socket of its API
	events *net.UnixListener
	stop   func()
}

// errEnded says that gvproxy did not start; it wraps what it printed.
var errEnded = errors.New("gvproxy ended")

// startPeer runs gvproxy with further arguments and waits until it says that it is ready, which it does when its API can
// be dialled.
func startPeer(t *testing.T, args ...string) (_ *peer, err error) {
	t.Helper()
	dir := t.TempDir()
	p := &peer{api: filepath.Join(dir, "api.sock")}
	p.events = listen(t, filepath.Join(dir, "events.sock"))
	args = append([]string{"-listen", "unix://" + p.api, "-notification", "unix://" + p.events.Addr().String()}, args...)
	var said bytes.Buffer
	cmd := exec.Command(program(t), args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	runtime.LockOSThread() // Pdeathsig is the thread's; the test keeps it to its end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- fmt.Errorf("%w: %w\n%s", errEnded, cmd.Wait(), &said)
		cancel()
	}()
	p.stop = func() {
		cmd.Process.Kill()
		<-ctx.Done()
	}
	t.Cleanup(p.stop)

	ready := make(chan error, 1)
	go func() {
		_, err := p.event(patience)
		ready <- err
	}()
	select {
	case err = <-ready:
	case err = <-ended:
		p.events.Close()
		<-ready
	}
	return p, err
}

func listen(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (p *peer) event(within time.Duration) (string, error) { return event(p.events, within) }

// event takes one notification.
func event(l *net.UnixListener, within time.Duration) (string, error) {
	if err := l.SetDeadline(time.Now().Add(within)); err != nil {
		return "", err
	}
	conn, err := l.Accept()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	var text bytes.Buffer
	_, err = text.ReadFrom(conn)
	return text.String(), err
}

// dial connects to an API.
func dial(t *testing.T, api string) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: api, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}
