package sock

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"
)

func listen(t *testing.T) (net.Listener, *http.Client) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "usernet.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return l, &http.Client{Transport: tr}
}

func TestServe(t *testing.T) {
	l, client := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
	}()

	res, err := client.Post("http://plugin.moby.localhost/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if text, err := io.ReadAll(res.Body); err != nil || string(text) != "hello" {
		t.Errorf("answer %s, %v", text, err)
	}
	// The connection stays open, as Docker keeps it; that must not hold the end up.
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := client.Post("http://plugin.moby.localhost/", "", nil); err == nil {
		t.Error("still served")
	}
}

// A request that is being served when the daemon stops gets its answer.
func TestServeLetsFinish(t *testing.T) {
	l, client := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	entered := make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-ctx.Done()
		if r.Context().Err() != nil {
			t.Error("the request was cancelled with the daemon")
		}
		io.WriteString(w, "done")
	})
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, h) }()
	answer := make(chan string, 1)
	go func() {
		res, err := client.Post("http://x/", "", nil)
		if err != nil {
			answer <- err.Error()
			return
		}
		defer res.Body.Close()
		text, _ := io.ReadAll(res.Body)
		answer <- string(text)
	}()
	<-entered
	cancel()
	if got := <-answer; got != "done" {
		t.Errorf("answer %q", got)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// One that does not finish is cut off.
func TestServeCutsOff(t *testing.T) {
	l, client := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	entered, left := make(chan struct{}), make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(left)
		close(entered)
		<-r.Context().Done()
	})
	served := make(chan error, 1)
	go func() { served <- serve(ctx, l, h, time.Millisecond) }()
	refused := make(chan error, 1)
	go func() {
		res, err := client.Post("http://x/", "", nil)
		if err == nil {
			res.Body.Close()
		}
		refused <- err
	}()
	<-entered
	cancel()
	if err := <-served; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Serve = %v, want context.DeadlineExceeded", err)
	}
	if err := <-refused; err == nil {
		t.Error("the client got an answer")
	}
	<-left
}

func TestServeBrokenListener(t *testing.T) {
	l, _ := listen(t)
	l.Close()
	if err := Serve(t.Context(), l, http.NotFoundHandler()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve = %v, want net.ErrClosed", err)
	}
}

func TestServeCancelledBefore(t *testing.T) {
	l, _ := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Serve(ctx, l, http.NotFoundHandler()); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is open: %v", err)
	}
}
