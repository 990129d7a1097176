// Package gvproxy_test holds usernet, under the name gvproxy, to what a real gvproxy does: the same requests, command lines
// and files go to both, and their answers are compared. The differences that are meant are in the tables, and have to be
// there. A guest with the real gvforwarder then has its whole network from usernet.
//
// USERNET_TEST_STRICT makes a missing gvproxy a failure; test/setup.sh bench builds it.
package gvproxy_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) {
	status := nettest.Main(m)
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(status)
}

// patience is how long anything may take on a busy machine.
const patience = time.Minute

// cached is the path of a program of gvisor-tap-vsock: gvproxy, gvforwarder.
func cached(t *testing.T, name string) string {
	t.Helper()
	cache := os.Getenv("USERNET_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/usernet-test"
	}
	path := filepath.Join(cache, "peers", name)
	if _, err := os.Stat(path); err != nil {
		err = fmt.Errorf("%s is not there; test/setup.sh bench builds it: %w", name, err)
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return path
}

// built is a directory with usernet, built once, also by the name gvproxy. USERNET_TEST_RACE builds it with the race detector.
var built struct {
	once sync.Once
	dir  string
	err  error
}

func ours(t *testing.T) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "usernet-gvproxy-"); built.err != nil {
			return
		}
		name := filepath.Join(built.dir, "usernet")
		cgo, args := "0", []string{"build", "-buildvcs=false", "-o", name}
		if os.Getenv("USERNET_TEST_RACE") != "" {
			cgo, args = "1", append(args, "-race")
		}
		cmd := exec.Command("go", append(args, "./cmd/usernet")...)
		cmd.Dir = "../.."
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("build usernet: %w: %s", err, out)
			return
		}
		built.err = os.Symlink(name, filepath.Join(built.dir, "gvproxy"))
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, "gvproxy")
}

// peer is a running gvproxy, theirs or ours.
type peer struct {
	api    string // the socket of its API
	events *net.UnixListener
	cmd    *exec.Cmd
	said   bytes.Buffer
	ended  chan struct{}
}

// errEnded says that gvproxy did not start; it wraps what it printed.
var errEnded = errors.New("gvproxy ended")

// startPeer runs the real gvproxy with further arguments and waits until it says that it is ready, which it does when its API
// can be dialled.
func startPeer(t *testing.T, args ...string) (*peer, error) {
	t.Helper()
	p, err := start(t, cached(t, "gvproxy"), args...)
	t.Cleanup(p.stop)
	return p, err
}

// startOurs is startPeer for usernet under the name gvproxy, which has to end well on SIGTERM.
func startOurs(t *testing.T, args ...string) (*peer, error) {
	t.Helper()
	return startUsernet(t, ours(t), args...)
}

// startUsernet runs usernet by one of its names. Called as usernet, it has the API at -services.
func startUsernet(t *testing.T, program string, args ...string) (*peer, error) {
	t.Helper()
	p, err := start(t, program, args...)
	t.Cleanup(func() {
		if err == nil {
			p.terminate(t)
		}
		p.stop()
		if t.Failed() {
			t.Logf("usernet said:\n%s", &p.said)
		}
	})
	return p, err
}

func start(t *testing.T, program string, args ...string) (_ *peer, err error) {
	t.Helper()
	dir := t.TempDir()
	p := &peer{api: filepath.Join(dir, "api.sock"), ended: make(chan struct{})}
	p.events = listen(t, filepath.Join(dir, "events.sock"))
	first := []string{"-listen"}
	if filepath.Base(program) == "usernet" {
		first = []string{"gateway", "-services"}
	}
	first = append(first, "unix://"+p.api, "-notification", "unix://"+p.events.Addr().String())
	p.cmd = exec.Command(program, append(first, args...)...)
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	run(t, p.cmd)
	go func() {
		p.cmd.Wait()
		close(p.ended)
	}()
	ready := make(chan error, 1)
	go func() {
		_, err := p.event(patience)
		ready <- err
	}()
	select {
	case err = <-ready:
	case <-p.ended:
		p.events.Close()
		<-ready
		err = fmt.Errorf("%w: %s\n%s", errEnded, p.cmd.ProcessState, &p.said)
	}
	return p, err
}

// run starts a program that does not outlive the test.
func run(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	runtime.LockOSThread() // Pdeathsig is the thread's; the test keeps it to its end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// stop kills gvproxy. It may be called again.
func (p *peer) stop() {
	p.cmd.Process.Kill()
	<-p.ended
}

// terminate ends gvproxy, which has to take the hint, and may be called again.
func (p *peer) terminate(t *testing.T) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Error("SIGTERM does not end it")
		p.cmd.Process.Signal(syscall.SIGQUIT) // Go says then what it does
		<-p.ended
	}
	if !p.cmd.ProcessState.Success() {
		t.Errorf("after SIGTERM: %s", p.cmd.ProcessState)
	}
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
