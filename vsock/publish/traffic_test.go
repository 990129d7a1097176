package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/vsock/proxy"
)

// The relays: the kernel's, and that of goroutines, which other systems have.
var relayKinds = map[string]func(net.Conn) net.Conn{
	"kernel":     func(c net.Conn) net.Conn { return c },
	"goroutines": func(c net.Conn) net.Conn { return halfCloser{c, c.(*net.UnixConn)} },
}

// halfCloser is a connection of a type that nobody knows.
type halfCloser struct {
	net.Conn
	unix *net.UnixConn
}

func (h halfCloser) CloseWrite() error { return h.unix.CloseWrite() }

// relayRig is the relays of a host port without the rest.
type relayRig struct {
	t      *testing.T
	wrap   func(net.Conn) net.Conn
	relays relays
}

// pair makes a connection of a client, relayed to the guest's end of a stream.
func (r *relayRig) pair() (client *net.TCPConn, guest *net.UnixConn, done chan struct{}) {
	r.t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		r.t.Fatal(err)
	}
	defer l.Close()
	client = dialTCP(r.t, l.Addr().String())
	accepted, err := l.AcceptTCP()
	if err != nil {
		r.t.Fatal(err)
	}
	u, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.t.TempDir() + "/s", Net: "unix"})
	if err != nil {
		r.t.Fatal(err)
	}
	defer u.Close()
	conn, err := net.DialUnix("unix", nil, u.Addr().(*net.UnixAddr))
	if err != nil {
		r.t.Fatal(err)
	}
	stream, err := u.AcceptUnix()
	if err != nil {
		r.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(within))
	r.t.Cleanup(func() { conn.Close() })
	done = make(chan struct{})
	r.relays.join(accepted, r.wrap(stream), func() { close(done) })
	return client, conn, done
}

func wait(t *testing.T, done chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(within):
		t.Fatal("the relay has not ended")
	}
}

func TestRelayEnds(t *testing.T) {
	for kind, wrap := range relayKinds {
		r := &relayRig{t: t, wrap: wrap}
		t.Run(kind+"/client first", func(t *testing.T) {
			client, guest, done := r.pair()
			io.WriteString(client, "question")
			client.CloseWrite()
			if b, err := io.ReadAll(guest); string(b) != "question" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
			io.WriteString(guest, "answer")
			guest.Close()
			if b, err := io.ReadAll(client); string(b) != "answer" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
			wait(t, done)
		})
		t.Run(kind+"/guest first", func(t *testing.T) {
			client, guest, done := r.pair()
			io.WriteString(guest, "greeting")
			guest.CloseWrite()
			if b, err := io.ReadAll(client); string(b) != "greeting" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
			io.WriteString(client, "thanks")
			client.Close()
			if b, err := io.ReadAll(guest); string(b) != "thanks" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
			wait(t, done)
		})
		t.Run(kind+"/client resets", func(t *testing.T) {
			client, guest, done := r.pair()
			io.WriteString(guest, "unread")
			io.ReadFull(client, make([]byte, 1))
			client.SetLinger(0)
			client.Close()
			if _, err := io.Copy(io.Discard, guest); err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Error(err)
			}
			wait(t, done) // the stream ended with it
		})
		t.Run(kind+"/guest lets data lie", func(t *testing.T) {
			client, guest, done := r.pair()
			io.WriteString(client, "unread")
			io.ReadFull(guest, make([]byte, 1))
			guest.Close() // with five bytes unread: a unix socket tells
			if _, err := io.ReadAll(client); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the client sees %v, want a reset", err)
			}
			wait(t, done)
		})
		t.Run(kind+"/closed", func(t *testing.T) {
			r := &relayRig{t: t, wrap: wrap}
			client, guest, done := r.pair()
			r.relays.close()
			wait(t, done)
			if _, err := io.ReadAll(client); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the client sees %v, want a reset", err)
			}
			if _, err := io.ReadAll(guest); err != nil {
				t.Error(err)
			}
			_, _, late := r.pair()
			wait(t, late)
		})
		r.relays.close()
	}
}

func TestRelayBulk(t *testing.T) {
	for kind, wrap := range relayKinds {
		t.Run(kind, func(t *testing.T) {
			r := &relayRig{t: t, wrap: wrap}
			defer r.relays.close()
			client, guest, done := r.pair()
			up, down := bytes.Repeat([]byte("upwards "), 1<<20), bytes.Repeat([]byte("down"), 1<<21)
			var running sync.WaitGroup
			for _, way := range []struct {
				from, to interface {
					io.ReadWriter
					CloseWrite() error
				}
				data []byte
			}{{client, guest, up}, {guest, client, down}} {
				running.Go(func() {
					way.from.Write(way.data)
					way.from.CloseWrite()
				})
				running.Go(func() {
					if got, err := io.ReadAll(way.to); err != nil || !bytes.Equal(got, way.data) {
						t.Errorf("%d bytes of %d, %v", len(got), len(way.data), err)
					}
				})
			}
			running.Wait()
			wait(t, done)
		})
	}
}

func TestChurn(t *testing.T) {
	t.Run("sockets", func(t *testing.T) { churn(t, newGateway(t, ServerConfig{}), nil) })
	t.Run("chunks", func(t *testing.T) { churn(t, newDeviceGateway(t, ServerConfig{}), nil) })
	t.Run("device", func(t *testing.T) {
		g := newDeviceGateway(t, ServerConfig{})
		churn(t, g, newDevice(t, g).dial)
	})
}

func churn(t *testing.T, g *gateway, dial func(context.Context) (net.Conn, error)) {
	c, _ := g.guest(dial)
	s := newServer(t)
	w := mustPublish(t, c, tcp(0), s.handle)
	at := fmt.Sprintf("127.0.0.1:%d", w.HostPort())
	const clients, each = 20, 50
	var running sync.WaitGroup
	for i := range clients {
		running.Go(func() {
			for j := range each {
				text := fmt.Sprintf("%d.%d", i, j)
				conn, err := net.DialTimeout("tcp", at, within)
				if err != nil {
					t.Error(err)
					return
				}
				conn.SetDeadline(time.Now().Add(within))
				if j%10 == 9 { // some do not stay for the answer
					conn.(*net.TCPConn).SetLinger(0)
					conn.Close()
					continue
				}
				io.WriteString(conn, text)
				conn.(*net.TCPConn).CloseWrite()
				got, err := io.ReadAll(conn)
				conn.Close()
				if err != nil || !strings.HasSuffix(string(got), "\n"+text) {
					t.Errorf("%s: %q, %v", text, got, err)
					return
				}
			}
		})
	}
	running.Wait()
	eventually(t, "no connection is left", func() bool { return g.Ports()[0].Active == 0 })
	if p := g.Ports()[0]; p.Accepted < clients*each*9/10 || p.Refused > clients*each/10 {
		t.Errorf("%+v", p)
	}
}

func askUDP(t *testing.T, conn net.Conn, text string) string {
	t.Helper()
	b := make([]byte, MaxDatagram)
	for range 50 { // a datagram may be lost
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(400 * time.Millisecond))
		if n, err := conn.Read(b); err == nil {
			return string(b[:n])
		}
	}
	t.Fatal("no answer")
	return ""
}

func TestUDP(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	s := newServer(t)
	w := mustPublish(t, c, udp(5353), s.handle)
	for _, at := range []string{"127.0.0.1:5353", "127.0.0.9:5353", "[::1]:5353"} {
		conn, err := net.Dial("udp", at)
		if err != nil {
			t.Fatal(err)
		}
		// Connected: an answer from another address would not be heard.
		for _, text := range []string{"hello", "", strings.Repeat("x", 60000), "again"} {
			want := fmt.Sprintf("%s to %s\n%s", conn.LocalAddr(), conn.RemoteAddr(), text)
			if got := askUDP(t, conn, text); got != want {
				t.Errorf("%s: %.60q, want %.60q", at, got, want)
			}
		}
		conn.Close()
	}
	if p := g.Ports(); len(p) != 1 || p[0].Active != 3 || p[0].Accepted != 3 {
		t.Errorf("%+v", p)
	}
	w.Close()
	if len(g.Ports()) != 0 {
		t.Errorf("%+v", g.Ports())
	}
	l, err := net.ListenPacket("udp4", ":5353")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := c.Publish(soon(t), udp(5353), s.handle); err == nil || err.Error() != "port 5353 is taken on the host: listen udp4 0.0.0.0:5353: bind: address already in use" {
		t.Error(err)
	}
}

// A guest that lets a flow's stream go ends the flow; the client's next datagram begins another one.
func TestFlowEndsWithItsStream(t *testing.T) {
	g := newGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	s := newServer(t)
	conns := make(chan net.Conn, 8)
	w := mustPublish(t, c, udp(5353), func(h proxy.Header, conn net.Conn) {
		conns <- conn
		s.handle(h, conn)
	})
	client, err := net.Dial("udp", "127.0.0.1:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	askUDP(t, client, "x")
	(<-conns).Close()
	eventually(t, "the flow has ended", func() bool { return g.Ports()[0].Active == 0 })
	askUDP(t, client, "x")
	if p := g.Ports()[0]; p.Accepted != 2 {
		t.Errorf("%+v", p)
	}
	w.Close()
}

func TestCarryDatagrams(t *testing.T) {
	echo, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer echo.Close()
	running.Go(func() {
		b := make([]byte, MaxDatagram)
		for {
			n, from, err := echo.ReadFrom(b)
			if err != nil {
				return
			}
			echo.WriteTo(b[:n], from)
		}
	})
	for _, end := range []string{"stream", "ctx"} {
		socket, err := net.Dial("udp4", echo.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		here, there := net.Pipe()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); CarryDatagrams(ctx, there, socket) }()
		here.SetDeadline(time.Now().Add(within))
		for _, text := range []string{"hello", "", strings.Repeat("x", 60000)} {
			frame := AppendDatagram(nil, []byte(text))
			here.Write(frame)
			got := make([]byte, len(frame))
			if _, err := io.ReadFull(here, got); err != nil || !bytes.Equal(got, frame) {
				t.Errorf("%.20q came back as %.20q, %v", frame, got, err)
			}
		}
		if end == "ctx" {
			cancel()
		} else {
			here.Close()
		}
		wait(t, done)
		cancel()
		if _, err := socket.Write(nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("ended by the %s: the socket is open", end)
		}
	}
}
