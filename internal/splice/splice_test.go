package splice

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sockets is a connection on the loopback: a bare descriptor, which the caller gives away or closes, and its peer.
func sockets(t *testing.T) (fd int, peer *net.TCPConn) {
	t.Helper()
	ln, port, err := Listen(loopback(0), false)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ln)
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp4", loopback(port).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fd, from, err := Accept(ln)
	if err != nil {
		t.Fatal(err)
	}
	if from.String() != c.LocalAddr().String() {
		t.Errorf("accepted a connection from %s, want %s", from, c.LocalAddr())
	}
	return fd, c.(*net.TCPConn)
}

func loopback(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

// joined is a client and a server with a Join between them, which has ended when the test is over.
func joined(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	client, server, _ = joinedIn(t, new(Group))
	return client, server
}

func joinedIn(t *testing.T, g *Group) (client, server *net.TCPConn, done chan struct{}) {
	t.Helper()
	a, client := sockets(t)
	b, server := sockets(t)
	done = make(chan struct{})
	g.Join(a, b, func() { close(done) })
	t.Cleanup(g.Close)
	return client, server, done
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
	for deadline := time.Now().Add(5 * time.Second); pipeEnds(t) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d pipe ends are open while nothing is being sent", pipeEnds(t))
		}
	}
}

// pipeEnds counts the pipe ends that the process has open, but for its standard ones.
func pipeEnds(t *testing.T) (n int) {
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

// What was said before a reset arrives, and then the reset.
func TestLastWordsBeforeReset(t *testing.T) {
	client, server := joined(t)
	const n = 50_000
	if _, err := server.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
	server.SetLinger(0)
	eventually(t, func() bool { return queued(t, client) == n })
	server.Close()
	got, err := io.Copy(io.Discard, client)
	if got != n || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client read %d bytes and %v, want %d and a reset", got, err, n)
	}
}

// A reset after the end of the stream still reaches the other side, which would go on sending.
func TestResetAfterHalfClose(t *testing.T) {
	client, server := joined(t)
	client.CloseWrite()
	if _, err := io.ReadAll(server); err != nil {
		t.Fatal(err)
	}
	client.SetLinger(0)
	client.Close()
	eventually(t, func() bool {
		_, err := server.Write([]byte("x"))
		return err != nil
	})
}

// One that sends to somebody who is gone learns of it, instead of being read for ever.
func TestSenderLearnsThatReceiverIsGone(t *testing.T) {
	client, server, done := joinedIn(t, new(Group))
	client.SetLinger(0)
	client.Close()
	b := make([]byte, 1<<20)
	for {
		if _, err := server.Write(b); err != nil {
			break
		}
	}
	<-done
}

// A receiver that does not read stops the sender, and gets everything once it reads.
func TestBackPressure(t *testing.T) {
	client, server := joined(t)
	r := rand.NewChaCha8([32]byte{9})
	sent := make(chan [32]byte)
	var moved atomic.Int64
	go func() {
		h := sha256.New()
		b := make([]byte, 300_000)
		for range 200 {
			r.Read(b)
			h.Write(b)
			if _, err := client.Write(b); err != nil {
				t.Error(err)
			}
			moved.Add(1)
		}
		client.CloseWrite()
		sent <- [32]byte(h.Sum(nil))
	}()
	last, since := int64(-1), time.Now()
	eventually(t, func() bool {
		if n := moved.Load(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) > 300*time.Millisecond
	})
	if last == 200 {
		t.Fatal("60 MB were taken for a receiver that does not read")
	}
	h := sha256.New()
	if _, err := io.Copy(h, server); err != nil {
		t.Fatal(err)
	}
	if got := <-sent; got != [32]byte(h.Sum(nil)) {
		t.Error("what arrived is not what was sent")
	}
}

// Closing a group resets what it cuts short, waits until it has ended, and leaves other groups alone.
func TestCloseEndsTheGroupAlone(t *testing.T) {
	var g Group
	client, server, done := joinedIn(t, &g)
	otherClient, otherServer := joined(t)
	g.Close()
	select {
	case <-done:
	default:
		t.Error("Close returned before the relay had ended")
	}
	for _, c := range []*net.TCPConn{client, server} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read %v after the group was closed, want a reset", err)
		}
	}
	otherClient.Write([]byte("on"))
	if _, err := io.ReadFull(otherServer, make([]byte, 2)); err != nil {
		t.Errorf("another group's connection: %v", err)
	}
	a, c := sockets(t)
	b, _ := sockets(t)
	late := false
	g.Join(a, b, func() { late = true })
	if _, err := c.Read(make([]byte, 1)); !late || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("joined after Close: done %v, read %v; want a reset", late, err)
	}
}

func TestServeManyAtOnce(t *testing.T) {
	ln, port, err := Listen(loopback(0), false)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ln)
	echo, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var servers sync.WaitGroup
	servers.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			servers.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	to := netip.MustParseAddrPort(echo.Addr().String())
	var g Group
	var active atomic.Int32
	g.Serve(ln, slog.New(slog.DiscardHandler), func(conn int, peer netip.AddrPort) {
		fd, err := Socket(to.Addr())
		if err == nil {
			if err = unix.Connect(fd, Sockaddr(to)); err == unix.EINPROGRESS {
				err = nil
			}
		}
		if err != nil {
			t.Error(err)
			Refuse(conn)
			return
		}
		g.Connect(fd, time.Second, func(err error) {
			if err != nil {
				t.Error(err)
			}
			active.Add(1)
			g.Join(conn, fd, func() { active.Add(-1) })
		})
	})
	var clients sync.WaitGroup
	for i := range 200 {
		clients.Go(func() {
			c, err := net.Dial("tcp4", loopback(port).String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			want := make([]byte, 1+i*331)
			rand.NewChaCha8([32]byte{byte(i)}).Read(want)
			go func() {
				c.Write(want)
				c.(*net.TCPConn).CloseWrite()
			}()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
				t.Errorf("echo of %d bytes: %d, %v", len(want), len(got), err)
			}
		})
	}
	clients.Wait()
	eventually(t, func() bool { return active.Load() == 0 })
	g.Close()
	echo.Close()
	servers.Wait()
}

func TestConnect(t *testing.T) {
	dial := func(t *testing.T, port uint16) int {
		fd, err := Socket(loopback(port).Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Connect(fd, Sockaddr(loopback(port))); err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
		return fd
	}
	// full is a listener whose queue takes nobody: connecting to it comes to no end.
	full := func(t *testing.T) uint16 {
		fd, err := Socket(loopback(0).Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := errors.Join(unix.Bind(fd, Sockaddr(loopback(0))), unix.Listen(fd, 0)); err != nil {
			t.Fatal(err)
		}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		port := AddrPort(sa).Port()
		dial(t, port)
		return port
	}
	t.Run("refused", func(t *testing.T) {
		var g Group
		defer g.Close()
		ln, port, err := Listen(loopback(0), false)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(ln)
		result := make(chan error, 1)
		g.Connect(dial(t, port), 5*time.Second, func(err error) { result <- err })
		if err := <-result; !errors.Is(err, unix.ECONNREFUSED) {
			t.Error(err)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		var g Group
		defer g.Close()
		result := make(chan error, 1)
		g.Connect(dial(t, full(t)), 50*time.Millisecond, func(err error) { result <- err })
		if err := <-result; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		var g Group
		result := make(chan error, 2)
		g.Connect(dial(t, full(t)), time.Minute, func(err error) { result <- err })
		g.Close()
		g.Connect(dial(t, full(t)), time.Minute, func(err error) { result <- err })
		for range 2 {
			if err := <-result; err != ErrClosed {
				t.Error(err)
			}
		}
	})
}

func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen within ten seconds")
		}
	}
}

// queued is how many bytes wait to be read from c.
func queued(t *testing.T, c *net.TCPConn) (n int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Nothing comes of expecting connections when the group is closed, and closing again is no error.
func TestExpectAfterClose(t *testing.T) {
	ln, _, err := Listen(loopback(0), false)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ln)
	var g Group
	expect := g.ServeOnDemand(ln, slog.New(slog.DiscardHandler), func(conn int, _ netip.AddrPort) { Refuse(conn) })
	expect(true)
	g.Close()
	expect(true)
	expect(false)
	g.Close()
}
