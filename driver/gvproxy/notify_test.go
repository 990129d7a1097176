package gvproxy

import (
	"context"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// logged keeps what is logged.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// start runs n until the test is over.
func start(t *testing.T, n *Notifier) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func listenAt(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := l.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return l
}

func next(t *testing.T, l net.Listener) string {
	t.Helper()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	text, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Each notification is a connection with one line on it.
func TestNotifications(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify.sock")
	l := listenAt(t, path)
	n := NewNotifier(path, slog.New(slog.DiscardHandler))
	vm := MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	n.Send(Ready, MAC{})
	start(t, n)
	n.Send(ConnectionEstablished, vm)
	n.Send(ConnectionClosed, vm)
	n.Send(HypervisorError, MAC{})
	for _, want := range []string{
		`{"notification_type":"ready"}` + "\n",
		`{"notification_type":"connection_established","mac_address":"5a:94:ef:e4:0c:ee"}` + "\n",
		`{"notification_type":"connection_closed","mac_address":"5a:94:ef:e4:0c:ee"}` + "\n",
		`{"notification_type":"hypervisor_error"}` + "\n",
	} {
		if got := next(t, l); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// Send does not wait for anybody: what does not fit in the queue is lost, with a word in the log.
func TestNotificationsQueue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify.sock")
	l := listenAt(t, path)
	var log logged
	n := NewNotifier(path, slog.New(slog.NewTextHandler(&log, nil)))
	for range maxWaiting {
		n.Send(ConnectionEstablished, MAC{1})
	}
	if log.String() != "" {
		t.Errorf("log: %s", log.String())
	}
	n.Send(HypervisorError, MAC{})
	if !strings.Contains(log.String(), "too many are waiting") {
		t.Errorf("log: %s", log.String())
	}
	start(t, n)
	for range maxWaiting {
		next(t, l)
	}
	n.Send(Ready, MAC{})
	if got, want := next(t, l), `{"notification_type":"ready"}`+"\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A listener that comes later misses what was sent before, and hears what is sent after.
func TestNotificationsLost(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify.sock")
	said := make(words, 1)
	n := NewNotifier(path, slog.New(slog.NewTextHandler(said, nil)))
	start(t, n)
	n.Send(Ready, MAC{})
	if got := <-said; !strings.Contains(got, "notification lost") || !strings.Contains(got, path) {
		t.Errorf("log: %s", got)
	}
	l := listenAt(t, path)
	n.Send(HypervisorError, MAC{})
	if got, want := next(t, l), `{"notification_type":"hypervisor_error"}`+"\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What waits when Run ends is told still.
func TestNotificationsLast(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify.sock")
	l := listenAt(t, path)
	n := NewNotifier(path, slog.New(slog.DiscardHandler))
	n.Send(Ready, MAC{})
	n.Send(HypervisorError, MAC{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	for _, want := range []Event{Ready, HypervisorError} {
		if got := next(t, l); !strings.Contains(got, string(want)) {
			t.Errorf("got %q, want %s", got, want)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	n = NewNotifier(path+".nobody", slog.New(slog.DiscardHandler))
	n.Send(Ready, MAC{})
	if err := n.Run(ctx); err != nil {
		t.Error(err)
	}
}

// words hands over each line of a log.
type words chan string

func (w words) Write(p []byte) (int, error) {
	w <- string(p)
	return len(p), nil
}

// With nobody to tell, Run waits for its end, and nothing piles up.
func TestNotificationsNobody(t *testing.T) {
	var log logged
	n := NewNotifier("", slog.New(slog.NewTextHandler(&log, nil)))
	start(t, n)
	for range 2 * maxWaiting {
		n.Send(Ready, MAC{})
	}
	if len(n.waiting) > 0 || log.String() != "" {
		t.Errorf("%d waiting, log: %s", len(n.waiting), log.String())
	}
}
