package vm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// api is the socket of the gateway's API.
func (r *rig) api() string { return filepath.Join(r.m.Own, "api.sock") }

// pidFile is written when a gateway is ready.
func (r *rig) pidFile() string { return filepath.Join(r.m.Own, "pid") }

// hybrid is where a gateway listens for what the machine sends to port 1024 of its vsock.
func (r *rig) hybrid() string { return "hybrid://" + r.vsock() + ":1024" }

// gateway starts usernet gateway and waits until it is ready.
func (r *rig) gateway(args ...string) engine.Daemon {
	r.Helper()
	return r.asGvproxy("usernet", append([]string{"gateway", "-services", "unix://" + r.api()}, args...)...)
}

// asGvproxy starts a program that writes the file that -pid-file names when it is ready.
func (r *rig) asGvproxy(name string, args ...string) engine.Daemon {
	r.Helper()
	r.on("rm", "-f", r.pidFile()) // of one that was killed
	return r.daemon(func() error { return there(r.pidFile()) }, name, append(args, "-pid-file", r.pidFile())...)
}

// on runs a command on the host, which must succeed, and returns what it prints.
func (r *rig) on(name string, args ...string) string {
	r.Helper()
	out, err := r.m.Run(r.Context(), name, args...)
	r.must(err)
	return out
}

// ports is what usernet gateway ports prints.
func (r *rig) ports() string {
	r.Helper()
	return r.on(filepath.Join(r.bin, "usernet"), "gateway", "ports", "-services", "unix://"+r.api())
}

// ask makes a request to a server on a unix socket of the host, for a path with a body, and returns what is answered.
func (r *rig) ask(socket, path, body string) (string, error) {
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	method := http.MethodPost
	if body == "" {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://gateway"+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	tr := &http.Transport{DialContext: r.m.DialUnix(socket), DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, text)
	}
	return string(text), err
}

// call makes a request to the gateway's API, which must succeed.
func (r *rig) call(path, body string) string {
	r.Helper()
	text, err := r.ask(r.api(), path, body)
	r.must(err)
	return text
}

// serves has an HTTP server on the host, to the end of the test.
func (r *rig) serves(addr string) {
	r.Helper()
	var l net.Listener
	r.must(r.m.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	}))
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { fmt.Fprintln(w, "host sees", q.RemoteAddr) })}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	r.Cleanup(func() {
		r.check(s.Close())
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			r.Error(err)
		}
	})
}

// free tells whether anybody could have a port of the host now, for TCP and UDP.
func (r *rig) free(port int) error {
	return r.m.Do(func() error {
		addr := fmt.Sprint(":", port)
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		c, err := net.ListenPacket("udp", addr)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		return errors.Join(l.Close(), c.Close())
	})
}

// udp asks the probe by UDP from the outside; its answer must contain the question and want.
func (r *rig) udp(addr, ask string, want ...string) {
	r.Helper()
	r.wait("the answer by UDP", func() error {
		ctx, cancel := context.WithTimeout(r.Context(), 20*time.Second)
		defer cancel()
		text, err := engine.AskUDP(ctx, r.outside(), addr, ask)
		if err != nil {
			return err
		}
		return contains(text, append(want, ask)...)
	})
}

// bulk sends bytes to an echo server from the outside and expects them back, and if ends says so, in a connection whose directions
// end one after the other.
func (r *rig) bulk(addr string, size int, ends bool) {
	r.Helper()
	conn, err := engine.Dial(r.Context(), r.outside(), "tcp", addr)
	r.must(err)
	defer conn.Close()
	r.must(conn.SetDeadline(time.Now().Add(patience)))
	sent := make([]byte, size)
	rand.Read(sent)
	failed := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		if ends {
			err = errors.Join(err, conn.(*net.TCPConn).CloseWrite())
		}
		failed <- err
	}()
	from := io.Reader(conn)
	if !ends {
		from = io.LimitReader(conn, int64(size))
	}
	got, err := io.ReadAll(from)
	conn.Close()
	if err := errors.Join(err, <-failed); err != nil || !bytes.Equal(got, sent) {
		r.Errorf("of %d bytes to %s, %d came back, or others: %v", size, addr, len(got), err)
	}
}
