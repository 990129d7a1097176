package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/usernet/usernet"
)

// open tells whether somebody listens on the port.
func open(port uint16) bool {
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func TestGatewayRestarts(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	s := newServer(t)
	w := mustPublish(t, c, tcp(0), s.handle)
	at := fmt.Sprintf("127.0.0.1:%d", w.HostPort())
	conn := dialTCP(t, at)
	g.stop()
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("a connection that the gateway cut has come to its end")
	}
	if open(w.HostPort()) {
		t.Error("the port is open without a gateway")
	}
	eventually(t, "lost", func() bool { return w.Err() != nil })
	g.start()
	eventually(t, "had again", func() bool { return w.Err() == nil })
	talk(t, at, "x")
}

func TestGuestEnds(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, stop := g.guest(nil)
	s := newServer(t)
	mustPublish(t, c, tcp(8080), s.handle)
	mustPublish(t, c, udp(8080), s.handle)
	conn := dialTCP(t, "127.0.0.1:8080")
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	stop()
	eventually(t, "closed", func() bool { return len(g.Ports()) == 0 })
	if _, err := io.ReadAll(conn); err == nil {
		t.Error("a connection that was cut has come to its end")
	}
	if _, err := c.Publish(soon(t), tcp(8081), s.handle); err == nil || err.Error() != "host gateway unix:gateway: the session has ended" {
		t.Errorf("publish by a client that has ended: %v", err)
	}
	// The port is for the next one.
	next, _ := g.guest(nil)
	mustPublish(t, next, tcp(8080), s.handle)
	talk(t, "127.0.0.1:8080", "x")
}

// What cannot be had again is retried.
func TestLostPort(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	s := newServer(t)
	w := mustPublish(t, c, tcp(8080), s.handle)
	g.stop()
	l, err := net.Listen("tcp4", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g.start()
	const taken = "port 8080 is taken on the host: listen tcp4 0.0.0.0:8080: bind: address already in use"
	eventually(t, "refused", func() bool { err := w.Err(); return err != nil && err.Error() == taken })
	l.Close()
	eventually(t, "had again", func() bool { return w.Err() == nil })
	talk(t, "127.0.0.1:8080", "x")
}

// TestPublishAgain: a guest that closes its last port lets go of the streams that stand, and none of those is for a client of the port
// that it publishes next.
func TestPublishAgain(t *testing.T) {
	for name, device := range map[string]bool{"socket": false, "device": true} {
		t.Run(name, func(t *testing.T) {
			g := newGateway(t, ServerConfig{})
			dial := g.dial
			if device {
				g.stop()
				g = newDeviceGateway(t, ServerConfig{})
				dial = newDevice(t, g).dial
			}
			c, _ := g.guest(dial)
			s := newServer(t)
			for range 100 {
				w := mustPublish(t, c, tcp(0), s.handle)
				talk(t, fmt.Sprintf("127.0.0.1:%d", w.HostPort()), "hello")
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// A guest's new session ends its old one, of which the host may not know that it is dead.
func TestSameGuestTwice(t *testing.T) {
	g := newGateway(t, ServerConfig{Limits: Limits{Sessions: 1}})
	c, _ := g.guest(nil)
	s := newServer(t)
	w := mustPublish(t, c, tcp(8080), s.handle)
	old := c.link
	twin := NewClient(ClientConfig{Dial: g.dial, Log: testLog(t)})
	twin.number = c.number
	l, err := twin.connect(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(g.Ports()); n != 0 {
		t.Errorf("%d ports of the old session are left", n)
	}
	l.lines.conn.Close()
	eventually(t, "a new session", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.link != nil && c.link != old
	})
	eventually(t, "had again", func() bool { return w.Err() == nil })
	talk(t, "127.0.0.1:8080", "x")
}

func TestNoGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewClient(ClientConfig{
			Dial: func(context.Context) (net.Conn, error) { return nil, io.ErrUnexpectedEOF },
			Name: "vsock://2:1024", Log: testLog(t),
		})
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { c.Run(ctx) })
		start := time.Now()
		_, err := c.Publish(ctx, tcp(8080), nil)
		if want := "host gateway vsock://2:1024: unexpected EOF"; err == nil || err.Error() != want {
			t.Errorf("publish: %v, want %q", err, want)
		}
		if d := time.Since(start); d != waitForGateway {
			t.Errorf("it took %s", d)
		}
		w := c.Keep(tcp(8080), nil)
		if err := w.Err(); err == nil {
			t.Error("a port is published nowhere")
		}
		w.Close()
		cancel()
		running.Wait()
	})
}

// listenPipe is a listener that is dialled by dial, within this process.
type listenPipe struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newListenPipe() *listenPipe {
	return &listenPipe{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *listenPipe) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listenPipe) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *listenPipe) Addr() net.Addr { return &net.UnixAddr{Net: "pipe"} }

func (l *listenPipe) dial(ctx context.Context) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestSilence is about peers that are there and say nothing any more: a machine that was stopped, a network that lost them.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newListenPipe()
		s := NewServer(ServerConfig{Log: testLog(t)})
		srv := &http.Server{Handler: s}
		var running sync.WaitGroup
		running.Go(func() { srv.Serve(l) })
		sessions := func() int {
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.sessions)
		}

		// A guest that pings stays.
		c := NewClient(ClientConfig{Dial: l.dial, Log: testLog(t)})
		ctx, stop := context.WithCancel(t.Context())
		running.Go(func() { c.Run(ctx) })
		time.Sleep(10 * silence)
		if n := sessions(); n != 1 || c.Err() != nil {
			t.Errorf("%d sessions after an idle while, %v", n, c.Err())
		}
		stop()
		synctest.Wait()
		if n := sessions(); n != 0 {
			t.Errorf("%d sessions after their end", n)
		}

		// One that does not goes.
		mute, err := NewClient(ClientConfig{Dial: l.dial, Log: testLog(t)}).connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() { io.Copy(io.Discard, mute.lines.conn) })
		synctest.Wait()
		if n := sessions(); n != 1 {
			t.Errorf("%d sessions, want 1", n)
		}
		time.Sleep(silence + time.Second)
		synctest.Wait()
		if n := sessions(); n != 0 {
			t.Error("a guest that says nothing is kept")
		}

		// And so does one that does not listen.
		deaf, err := NewClient(ClientConfig{Dial: l.dial, Log: testLog(t)}).connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		talking, shutUp := context.WithCancel(t.Context())
		running.Go(func() { deaf.lines.ping(talking) })
		time.Sleep(pingEvery + silence + time.Second)
		synctest.Wait()
		if n := sessions(); n != 0 {
			t.Error("a guest that does not listen is kept")
		}
		shutUp()
		srv.Close()
		s.Close()
		running.Wait()
	})
}

// A host that answers nothing is left for good.
func TestHostFallsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newListenPipe()
		var running sync.WaitGroup
		first := make(chan net.Conn, 1)
		running.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				select {
				case first <- conn:
					running.Go(func() {
						io.ReadFull(conn, make([]byte, 20))
						io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+Protocol+"\r\n"+secretHeader+": "+newNumber()+"\r\n\r\n")
						io.Copy(io.Discard, conn)
					})
				default:
					conn.Close()
				}
			}
		})
		c := NewClient(ClientConfig{Dial: l.dial, Name: "x", Log: testLog(t)})
		ctx, stop := context.WithCancel(t.Context())
		running.Go(func() { c.Run(ctx) })
		start := time.Now()
		_, err := c.Publish(ctx, tcp(80), nil)
		if err == nil || !strings.HasPrefix(err.Error(), "the session has ended") && !strings.HasPrefix(err.Error(), "host gateway x: ") {
			t.Errorf("publish: %v", err)
		}
		if d := time.Since(start); d > answerWithin+waitForGateway {
			t.Errorf("it took %s", d)
		}
		stop()
		l.Close()
		running.Wait()
	})
}

func TestLimits(t *testing.T) {
	g := newGateway(t, ServerConfig{Limits: Limits{Sessions: 2, Ports: 3, Conns: 2}})
	c, _ := g.guest(nil)
	s := newServer(t)
	for range 3 {
		mustPublish(t, c, tcp(0), s.handle)
	}
	if _, err := c.Publish(soon(t), tcp(0), s.handle); err == nil || err.Error() != "3 ports are the most that the gateway opens for a guest" {
		t.Errorf("a fourth port: %v", err)
	}
	port := g.Ports()[0].Port
	at := fmt.Sprintf("127.0.0.1:%d", port)
	var held []*net.TCPConn
	for range 2 {
		conn := dialTCP(t, at)
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		held = append(held, conn)
	}
	third, err := net.Dial("tcp", at)
	if err == nil { // or the reset was faster
		defer third.Close()
		third.SetDeadline(time.Now().Add(within))
		_, err = io.ReadAll(third)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a third connection: %v, want a reset", err)
	}
	if p := g.Ports()[0]; p.Active != 2 || p.Refused != 1 || p.Accepted != 2 {
		t.Errorf("%+v", p)
	}
	held[0].Close()
	eventually(t, "one less", func() bool { return g.Ports()[0].Active == 1 })
	talk(t, at, "x")

	g.guest(nil)
	eventually(t, "two sessions", func() bool { g.Server.mu.Lock(); defer g.Server.mu.Unlock(); return len(g.sessions) == 2 })
	tooMany, _ := g.guest(nil)
	if _, err := tooMany.Publish(soon(t), tcp(0), s.handle); err == nil || err.Error() != "host gateway unix:gateway: too many sessions, there are 2" {
		t.Errorf("a third session: %v", err)
	}
}

// A guest that makes no streams, or too many, harms nobody: connections wait for a while, and are closed.
func TestNoStreams(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	lazy := NewClient(ClientConfig{Dial: g.dial, Log: testLog(t)})
	l, err := lazy.connect(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	ask(t, l, message{Op: opPublish, ID: 1, Proto: usernet.TCP, Port: 8080})
	waiting := dialTCP(t, "127.0.0.1:8080")
	other, _ := g.guest(nil)
	s := newServer(t)
	mustPublish(t, other, tcp(8081), s.handle)
	talk(t, "127.0.0.1:8081", "x")

	// A stream that comes late serves who waits; of too many, the oldest go.
	for range maxStanding + 10 {
		conn, err := g.dial(soon(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := upgrade(soon(t), conn, StreamPath, secretHeader, l.secret); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a stream", func() bool { p := g.Ports()[0]; return p.Accepted == 1 })
	g.Server.mu.Lock()
	pool := &g.sessions[l.secret].pool
	g.Server.mu.Unlock()
	eventually(t, "a full pool", func() bool { pool.mu.Lock(); defer pool.mu.Unlock(); return len(pool.standing) == maxStanding })
	l.lines.conn.Close()
	if _, err := io.ReadAll(waiting); err == nil {
		t.Error("a connection that nobody served has come to its end")
	}
	talk(t, "127.0.0.1:8081", "x")
}

// ask puts a question by hand and returns the answer.
func ask(t testing.TB, l *link, q message) message {
	t.Helper()
	if err := l.lines.write(q); err != nil {
		t.Fatal(err)
	}
	for {
		a, err := l.lines.read()
		if err != nil {
			t.Fatal(err)
		}
		if a.ID == q.ID {
			return a
		}
	}
}

func TestPoolWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pool
		start := time.Now()
		if _, err := p.take(nil, start.Add(maxWait)); err != errNoStream || time.Since(start) != maxWait {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
		done := make(chan struct{})
		close(done)
		if _, err := p.take(done, start.Add(time.Hour)); err != errNoStream {
			t.Error(err)
		}
		var waiting sync.WaitGroup
		for range maxWaiting {
			waiting.Go(func() {
				if _, err := p.take(nil, time.Now().Add(maxWait)); err != ErrClosed {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if _, err := p.take(nil, time.Now().Add(maxWait)); err != errBusy {
			t.Error(err)
		}
		p.close()
		waiting.Wait()
		here, there := net.Pipe()
		p.put(stream{conn: here})
		if _, err := there.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("a stream for a closed pool: %v", err)
		}
	})
}
