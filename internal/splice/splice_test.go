package splice

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a TCP connection's two ends on the loopback.
func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	a, b = c.(*net.TCPConn), s.(*net.TCPConn)
	t.Cleanup(func() { a.Close(); b.Close() })
	for _, end := range []*net.TCPConn{a, b} {
		end.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return a, b
}

// joined is a client and a server with a Join between them.
func joined(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	client, a := pair(t)
	b, server := pair(t)
	for _, end := range []*net.TCPConn{a, b} {
		end.SetDeadline(time.Time{})
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		defer a.Close()
		Join(ctx, a, b)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return client, server
}

// Pieces of every size around the one from which on they are spliced, in both directions, arrive as they were sent.
func TestJoinKeepsEveryByte(t *testing.T) {
	client, server := joined(t)
	const total = 16 << 20
	send := func(c *net.TCPConn, seed byte) {
		r := rand.New(rand.NewChaCha8([32]byte{seed}))
		src := rand.NewChaCha8([32]byte{seed, 1})
		for left := int64(total); left > 0; {
			n := min(left, int64(r.IntN(5*block)))
			if _, err := io.CopyN(c, src, n); err != nil {
				t.Error(err)
				return
			}
			left -= n
		}
		c.CloseWrite()
	}
	sum := func(r io.Reader) [32]byte {
		h := sha256.New()
		if n, err := io.Copy(h, r); n != total || err != nil {
			t.Errorf("received %d of %d bytes, %v", n, total, err)
		}
		return [32]byte(h.Sum(nil))
	}
	go send(client, 1)
	go send(server, 2)
	up := make(chan [32]byte)
	go func() { up <- sum(server) }()
	down := sum(client)
	if got := <-up; got != sum(io.LimitReader(rand.NewChaCha8([32]byte{1, 1}), total)) {
		t.Error("what the server received is not what the client sent")
	}
	if down != sum(io.LimitReader(rand.NewChaCha8([32]byte{2, 1}), total)) {
		t.Error("what the client received is not what the server sent")
	}
}

func TestIdleConnectionHoldsNoPipe(t *testing.T) {
	client, server := joined(t)
	b := make([]byte, 1<<20)
	for _, way := range [][2]*net.TCPConn{{client, server}, {server, client}} {
		go way[0].Write(b)
		if _, err := io.ReadFull(way[1], make([]byte, len(b))); err != nil {
			t.Fatal(err)
		}
	}
	// Package net pools its pipes; the garbage collector empties the pool.
	for deadline := time.Now().Add(5 * time.Second); ; runtime.GC() {
		n := pipes(t)
		if n == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d pipe ends are open while nothing is being sent", n)
		}
	}
}

// pipes counts the pipe ends that the process has open, but for its standard ones.
func pipes(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(target, "pipe:") {
			n++
		}
	}
	return n - standardPipes
}

// standardPipes are those that the process was started with.
var standardPipes = func() (n int) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(target, "pipe:") {
			n++
		}
	}
	return n
}()

func TestResetIsPassedOn(t *testing.T) {
	client, server := joined(t)
	if _, err := client.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(server, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	client.SetLinger(0)
	client.Close()
	if _, err := server.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the server read %v, want a reset", err)
	}
}

func TestHalfClose(t *testing.T) {
	client, server := joined(t)
	client.Write([]byte("request"))
	client.CloseWrite()
	if b, err := io.ReadAll(server); err != nil || string(b) != "request" {
		t.Fatalf("request %q, %v", b, err)
	}
	server.Write([]byte("answer"))
	server.Close()
	if b, err := io.ReadAll(client); err != nil || string(b) != "answer" {
		t.Errorf("answer %q, %v", b, err)
	}
}

func TestAcceptEndsWithItsLastClient(t *testing.T) {
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithCancel(context.Background())
	serving, release := make(chan struct{}), make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		Accept(ctx, ln, slog.New(slog.DiscardHandler), func(c *net.TCPConn) {
			close(serving)
			<-release
			Refuse(c)
		})
	}()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	<-serving
	cancel()
	select {
	case <-done:
		t.Error("Accept returned while a client was served")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	<-done
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the refused client read %v, want a reset", err)
	}
}
