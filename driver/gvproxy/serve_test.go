package gvproxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener in memory, so that time can be the test's own.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p pipes) Close() error   { close(p.closed); return nil }
func (p pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// Who does not finish a request within 10 s is cut off, and an Expose that hangs is answered before that.
func TestServeTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := slow{newFake()}
		l := pipes{make(chan net.Conn), make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		log := slog.New(slog.DiscardHandler)
		go func() { served <- Serve(ctx, l, Services(g, log), log) }()
		dial := func() net.Conn {
			client, server := net.Pipe()
			l.conns <- server
			return client
		}

		for _, unfinished := range []string{
			"",
			"GET /cam HTTP/1.1\r\nHost: x\r\n",
			"POST " + exposePath + " HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
		} {
			start := time.Now()
			conn := dial()
			go io.WriteString(conn, unfinished)
			if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("%q: %v", unfinished, err)
			}
			if took := time.Since(start); took < timeout || took > timeout+time.Second {
				t.Errorf("%q: cut off after %s", unfinished, took)
			}
			conn.Close()
		}

		start := time.Now()
		conn := dial()
		body := `{"local":":1","remote":"192.168.127.2:1"}`
		go io.WriteString(conn, "POST "+exposePath+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 41\r\n\r\n"+body)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(res.Body)
		if res.StatusCode != 500 || string(text) != "context deadline exceeded\n" || err != nil {
			t.Errorf("hanging Expose: %d %q, %v", res.StatusCode, text, err)
		}
		if took := time.Since(start); took != working {
			t.Errorf("hanging Expose answered after %s", took)
		}
		conn.Close()

		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// slow is a gateway whose Expose hangs.
type slow struct{ *fake }

func (slow) Expose(ctx context.Context, _ Forward) error {
	<-ctx.Done()
	return ctx.Err()
}

// With a context that is done, Serve ends at once and has nothing to complain of.
func TestServeEnded(t *testing.T) {
	l := pipes{make(chan net.Conn), make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var said strings.Builder
	log := slog.New(slog.NewTextHandler(&said, nil))
	h := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("served") })
	if err := Serve(ctx, l, h, log); err != nil {
		t.Error(err)
	}
	if said.Len() > 0 {
		t.Errorf("log: %s", said.String())
	}
}
