package portmap

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// serve runs a TCP server of a pretend container and returns its port; it goes with the test. serve's connections
// are closed when handle returns.
func serve(t testing.TB, host netip.Addr, handle func(c *net.TCPConn)) uint16 {
	t.Helper()
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(host, 0)))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.AcceptTCP()
			if errors.Is(err, unix.EMFILE) { // a test of that: the container is in the same process
				time.Sleep(time.Millisecond)
				continue
			}
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				handle(c)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	return addrPort(ln.Addr()).Port()
}

func echo(c *net.TCPConn) { io.Copy(c, c) }

// dial connects a client that gives up before the test would hang.
func dial(t testing.TB, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// exchange sends text and wants it back.
func exchange(t testing.TB, c *net.TCPConn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("got %q (%v), want %q", b, err, text)
	}
}

// mustReset reads until the end, which must be a reset.
func mustReset(t testing.TB, c *net.TCPConn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %d bytes, then %v; want connection reset", n, err)
	}
}

// mustRefuse connects a client that must be reset at once: perhaps before its connect has returned.
func mustRefuse(t testing.TB, to netip.AddrPort) {
	t.Helper()
	c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
	if err != nil {
		if !errors.Is(err, unix.ECONNRESET) {
			t.Error(err)
		}
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	mustReset(t, c)
}

func tcpPort(p uint16) usernet.Port { return usernet.Port{Proto: usernet.TCP, ContainerPort: p} }

func TestTCPBothFamiliesAndHalfClose(t *testing.T) {
	for _, tt := range []struct {
		name         string
		addr4, addr6 string
		host, want   string // want: the container's address that is reached
	}{
		{"v4 only, v4 client", "127.0.0.10", "", "127.0.0.1", "127.0.0.10"},
		{"v4 only, v6 client", "127.0.0.10", "", "::1", "127.0.0.10"},
		{"v6 only, v4 client", "", "::1", "127.0.0.1", "::1"},
		{"v6 only, v6 client", "", "::1", "::1", "::1"},
		{"both, v4 client", "127.0.0.10", "::1", "127.0.0.1", "127.0.0.10"},
		{"both, v6 client", "127.0.0.10", "::1", "::1", "::1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMapper(t)
			request := make([]byte, 3<<20)
			rand.Read(request)
			// It answers only after the end of the request: with a digest, and then for long.
			answer := bytes.Repeat([]byte("to the client "), 1<<18)
			port := serve(t, addr(tt.want), func(c *net.TCPConn) {
				h := sha256.New()
				io.Copy(h, c)
				c.Write(h.Sum(nil))
				c.Write(answer)
			})
			f, err := m.Publish(Request{Port: tcpPort(port), Addr4: addr(tt.addr4), Addr6: addr(tt.addr6), Dialer: Host{}})
			if err != nil {
				t.Fatal(err)
			}
			defer closeSoon(t, f)
			c := dial(t, at(f, tt.host))
			if _, err := c.Write(request); err != nil {
				t.Fatal(err)
			}
			c.CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(request)
			if want := append(sum[:], answer...); !bytes.Equal(got, want) {
				t.Errorf("%d bytes came back and differ from the %d sent", len(got), len(want))
			}
			eventually(t, "connection ended", func() bool { return f.Stats() == Stats{Accepted: 1} })
		})
	}
}

// A server that listens for IPv4 only is found by clients that came by IPv6.
func TestTCPOtherFamilyWhenRefused(t *testing.T) {
	m := newMapper(t)
	f, err := m.Publish(Request{
		Port: tcpPort(serve(t, container, echo)), Addr4: container, Addr6: netip.IPv6Loopback(), Dialer: Host{},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer closeSoon(t, f)
	for _, host := range []string{"::1", "127.0.0.1"} {
		exchange(t, dial(t, at(f, host)), "hello")
	}
	if got, want := f.Stats(), (Stats{Accepted: 2}); got.Accepted != want.Accepted || got.Refused != 0 {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestTCPServerEndsFirst(t *testing.T) {
	m := newMapper(t)
	got := make(chan string, 1)
	port := serve(t, container, func(c *net.TCPConn) {
		io.WriteString(c, "goodbye")
		c.CloseWrite()
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	f := mustPublish(t, m, tcpPort(port), Host{})
	c := dial(t, at(f, "127.0.0.1"))
	if b, err := io.ReadAll(c); err != nil || string(b) != "goodbye" {
		t.Fatalf("read %q, %v", b, err)
	}
	io.WriteString(c, "and to you")
	c.Close()
	if s := <-got; s != "and to you" {
		t.Errorf("the server read %q after it had ended its direction", s)
	}
}

func TestTCPRefusedIsReset(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, tcpPort(1), Host{}) // nobody listens there
	mustRefuse(t, at(f, "127.0.0.1"))
	mustRefuse(t, at(f, "::1"))
	eventually(t, "two refused", func() bool { return f.Stats() == Stats{Refused: 2} })
}

func TestTCPResetIsPassedOn(t *testing.T) {
	t.Run("by the client", func(t *testing.T) {
		m := newMapper(t)
		end := make(chan error, 1)
		port := serve(t, container, func(c *net.TCPConn) {
			c.Write([]byte("hello"))
			_, err := io.Copy(io.Discard, c)
			end <- err
		})
		f := mustPublish(t, m, tcpPort(port), Host{})
		c := dial(t, at(f, "127.0.0.1"))
		io.ReadFull(c, make([]byte, 5))
		c.SetLinger(0)
		c.Close()
		if err := <-end; !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the server read %v, want connection reset", err)
		}
	})
	t.Run("by the server", func(t *testing.T) {
		m := newMapper(t)
		port := serve(t, container, func(c *net.TCPConn) {
			c.Read(make([]byte, 1))
			c.SetLinger(0)
		})
		f := mustPublish(t, m, tcpPort(port), Host{})
		c := dial(t, at(f, "127.0.0.1"))
		c.Write([]byte("x"))
		mustReset(t, c)
	})
}

// A server that refuses an upload half-way answers, and closes with the rest unread: its kernel sends the answer and
// a reset. Both have to reach the client, in that order, however the relay's two directions interleave.
func TestTCPAnswerBeforeReset(t *testing.T) {
	m := newMapper(t)
	answer := bytes.Repeat([]byte("413 "), 4096)
	port := serve(t, container, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1000))
		c.Write(answer)
	})
	f := mustPublish(t, m, tcpPort(port), Host{})
	for i := range 100 {
		c := dial(t, at(f, "127.0.0.1"))
		var wg sync.WaitGroup
		wg.Go(func() {
			for upload := make([]byte, 64<<10); ; {
				if _, err := c.Write(upload); err != nil {
					return
				}
			}
		})
		// The writer may be told of the reset in the reader's place, which then sees an end: both are the kernel's.
		got, err := io.ReadAll(c)
		wg.Wait()
		if !bytes.Equal(got, answer) || err != nil && !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("client %d read %d bytes and %v, want %d bytes", i, len(got), err, len(answer))
		}
		c.Close()
	}
}

// When the server resets a connection that the client is still sending on, the write hears of the reset, and the
// read of the other direction sees what looks like an end. The client must not be told that its answer was complete.
func TestTCPResetIsNotAnEnd(t *testing.T) {
	m := newMapper(t)
	port := serve(t, container, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1<<20))
		c.SetLinger(0)
	})
	f := mustPublish(t, m, tcpPort(port), Host{})
	for range 100 {
		c := dial(t, at(f, "127.0.0.1"))
		var sent error
		for upload := make([]byte, 64<<10); sent == nil; {
			_, sent = c.Write(upload)
		}
		if !errors.Is(sent, unix.ECONNRESET) {
			// EPIPE would be the answer to data sent after an orderly end.
			t.Fatalf("the client's write ended with %v, want connection reset", sent)
		}
		c.Close()
	}
}

func TestTCPManyAtOnce(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, tcpPort(serve(t, container, echo)), Host{})
	const clients = 500
	var connected, done sync.WaitGroup
	connected.Add(clients)
	all := make(chan struct{})
	for i := range clients {
		done.Go(func() {
			c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(at(f, []string{"127.0.0.1", "::1"}[i%2])))
			connected.Done()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			<-all
			text := bytes.Repeat([]byte(fmt.Sprintf("client %d ", i)), 2000)
			go c.Write(text)
			got := make([]byte, len(text))
			if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, text) {
				t.Errorf("client %d did not get back what it sent: %v", i, err)
			}
		})
	}
	connected.Wait()
	eventually(t, "all connected", func() bool { return f.Stats() == Stats{Accepted: clients, Active: clients} })
	close(all)
	done.Wait()
	eventually(t, "all gone", func() bool { return f.Stats() == Stats{Accepted: clients} })
}

func TestTCPCloseDuringTraffic(t *testing.T) {
	m := newMapper(t)
	port := serve(t, container, func(c *net.TCPConn) {
		go io.Copy(io.Discard, c)
		for b := make([]byte, 64<<10); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	f := mustPublish(t, m, tcpPort(port), Host{})
	var moving, done sync.WaitGroup
	for i := range 20 {
		c := dial(t, at(f, "127.0.0.1"))
		moving.Add(1)
		done.Go(func() {
			n, err := io.ReadFull(c, make([]byte, 1<<20))
			moving.Done()
			if err != nil {
				t.Errorf("read %d bytes, then %v", n, err)
			}
			if i%2 == 0 { // the others stop reading: Close must not wait for their buffers
				mustReset(t, c)
			}
		})
	}
	moving.Wait()
	closeSoon(t, f)
	done.Wait()
	if got := f.Stats(); got.Active != 0 {
		t.Errorf("after Close: %+v", got)
	}
	if c, err := net.Dial("tcp", at(f, "127.0.0.1").String()); err == nil {
		c.Close()
		t.Error("the port still answers after Close")
	}
}

func TestTCPSourceIsPassedToTheDialer(t *testing.T) {
	m := newMapper(t)
	d := newSpy()
	f := mustPublish(t, m, tcpPort(serve(t, container, echo)), d)
	for _, host := range []string{"127.0.0.1", "::1"} {
		c := dial(t, at(f, host))
		exchange(t, c, "hello")
		if got, want := <-d.clients, addrPort(c.LocalAddr()); got != want {
			t.Errorf("the dialer was told %v, the client is %v", got, want)
		}
	}
}
