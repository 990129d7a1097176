package forward

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/usernet/usernet/driver/gvproxy"
)

const patience = 20 * time.Second

// fake is a Network whose machines are on the loopback. It notes who asked, and holds dials up while there are holes.
type fake struct {
	clients chan netip.AddrPort

	mu      sync.Mutex
	wrapTCP func(net.Conn) net.Conn // for DialTCP; nil: as it is
	wrapUDP func(net.Conn) net.Conn
	holes   int // so many of the next dials get no answer
}

func newFake() *fake { return &fake{clients: make(chan netip.AddrPort, 10000)} }

// change changes what is below mu.
func (n *fake) change(f func(n *fake)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(n)
}

func (n *fake) hole() (hole bool) {
	n.change(func(n *fake) {
		if hole = n.holes > 0; hole {
			n.holes--
		}
	})
	return hole
}

func (n *fake) DialTCP(ctx context.Context, client, to netip.AddrPort) (net.Conn, error) {
	n.clients <- client
	if n.hole() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", to.String())
	n.change(func(n *fake) {
		if err == nil && n.wrapTCP != nil {
			conn = n.wrapTCP(conn)
		}
	})
	return conn, err
}

func (n *fake) DialUDP(client, to netip.AddrPort) (net.Conn, error) {
	n.clients <- client
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return nil, err
	}
	if n.wrapUDP != nil {
		return n.wrapUDP(conn), nil
	}
	return conn, nil
}

func (n *fake) JoinTCP(ctx context.Context, host net.Conn, client, to netip.AddrPort) error {
	guest, err := n.DialTCP(ctx, client, to)
	if err != nil {
		reset(host)
		return err
	}
	stop := context.AfterFunc(ctx, func() { reset(host); reset(guest) })
	defer stop()
	var wg sync.WaitGroup
	for _, d := range [][2]net.Conn{{host, guest}, {guest, host}} {
		wg.Go(func() {
			if _, err := io.Copy(d[0], d[1]); err != nil {
				reset(host)
				reset(guest)
				return
			}
			d[0].(interface{ CloseWrite() error }).CloseWrite()
		})
	}
	wg.Wait()
	host.Close()
	guest.Close()
	return nil
}

// noLeaks checks when the test has ended that no goroutine is left of it. Call it first.
func noLeaks(t testing.TB) {
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

// start opens a forward with limits, which goes with the test.
func start(t testing.TB, n Network, proto gvproxy.Proto, local, remote string, change func(*limits)) *Forward {
	t.Helper()
	spec, err := gvproxy.ParseForward(proto, local, remote)
	if err != nil {
		t.Fatal(err)
	}
	l := standard
	if change != nil {
		change(&l)
	}
	f, err := open(t.Context(), spec, n, slog.New(slog.DiscardHandler), l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeSoon(t, f) })
	return f
}

// closeSoon fails the test when Close does not end promptly, or not a second time.
func closeSoon(t testing.TB, f *Forward) {
	t.Helper()
	for range 2 {
		done := make(chan error, 1)
		go func() { done <- f.Close() }()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("close: %v", err)
			}
		case <-time.After(patience):
			t.Fatal("Close does not end")
		}
	}
	if n := f.Stats().Active; n != 0 {
		t.Errorf("%d are active after Close", n)
	}
}

// freePort returns HOST:PORT with a port that is free for TCP and UDP, at all addresses.
func freePort(t testing.TB, host string) string {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		at := l.Addr().(*net.TCPAddr)
		pc, err := net.ListenPacket("udp", l.Addr().String())
		l.Close()
		if err == nil {
			pc.Close()
			_, port, _ := net.SplitHostPort(at.String())
			return net.JoinHostPort(host, port)
		}
	}
	t.Fatal("no free port")
	return ""
}

// port is the port of HOST:PORT with another host.
func port(t testing.TB, host, at string) string {
	t.Helper()
	_, p, err := net.SplitHostPort(at)
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort(host, p)
}

// serve runs handle for each connection to a listener that goes with the test.
func serve(t testing.TB, l net.Listener, handle func(net.Conn)) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				stop := context.AfterFunc(t.Context(), func() { conn.Close() })
				defer stop()
				handle(conn)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

// shout sends back what it gets when it has got all.
func shout(conn net.Conn) {
	text, err := io.ReadAll(conn)
	if err == nil {
		conn.Write(append([]byte("got "), text...))
	}
}

// echo sends back what it gets as it gets it.
func echo(conn net.Conn) { io.Copy(conn, conn) }

// machine is a TCP server on the loopback.
func machine(t testing.TB, host string, handle func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, handle)
	return l.Addr().String()
}

func dial(t testing.TB, network, at string) net.Conn {
	t.Helper()
	conn, err := net.Dial(network, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// ask sends text and its end to a shout, and expects the answer and its end.
func ask(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != "got "+text {
		t.Fatalf("answer %.40q, %v, want that to %.40q", got, err, text)
	}
}

// exchange sends text to an echo and expects it back. It leaves the connection open.
func exchange(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("answer %.40q, %v, want %.40q", got, err, text)
	}
}

// gone expects the connection to be ended from the other side: by a reset, or, if end is allowed, an end of file.
func gone(t testing.TB, conn net.Conn, endAllowed bool) {
	t.Helper()
	n, err := conn.Read(make([]byte, 1))
	if e, ok := errors.AsType[net.Error](err); n > 0 || err == nil || ok && e.Timeout() || err == io.EOF && !endAllowed {
		t.Errorf("read %d bytes, %v, want a reset", n, err)
	}
}

// turnedAway expects a new connection to be reset, be it before it is seen to stand.
func turnedAway(t testing.TB, network, at string) {
	t.Helper()
	conn, err := net.Dial(network, at)
	if errors.Is(err, syscall.ECONNRESET) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	gone(t, conn, network == "unix") // which has no reset
}

// eventually waits for something that has no event of its own: a counter, or the kernel.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}
