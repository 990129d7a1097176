package usermode

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// noise is n bytes that are the same for the same seed.
func noise(seed byte, n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{seed}), n)
}

func sum(t testing.TB, r io.Reader) (string, int64) {
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		t.Errorf("after %d bytes: %v", n, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil)), n
}

// Both directions at once, every byte checked.
func TestTCPTransfer(t *testing.T) {
	for _, v := range []variant{{1500, true}, {1280, true}, {65520, true}, {1500, false}, {1280, false}, {65520, false}} {
		t.Run(v.String(), func(t *testing.T) {
			size := int64(64 << 20)
			if !v.offload && v.mtu < 65520 || testing.Short() {
				size = 8 << 20
			}
			b := newBed(t, v)
			for _, addr := range []netip.Addr{host4.Addr(), host6.Addr()} {
				transfer(t, b, addr, size)
			}
		})
	}
}

func transfer(t *testing.T, b *bed, addr netip.Addr, size int64) {
	wantUp, _ := sum(t, noise(1, size))
	wantDown, _ := sum(t, noise(2, size))
	served := make(chan struct{})
	to := listenTCP(t, addr, func(c *net.TCPConn) {
		defer close(served)
		var wg sync.WaitGroup
		wg.Go(func() {
			if got, n := sum(t, c); got != wantUp {
				t.Errorf("%s: up: %d bytes of %d, or wrong ones", addr, n, size)
			}
		})
		if _, err := io.Copy(c, noise(2, size)); err != nil {
			t.Error(err)
		}
		c.CloseWrite()
		wg.Wait()
	})
	c := b.mustDial(t, "tcp", to).(*net.TCPConn)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.Copy(c, noise(1, size)); err != nil {
			t.Error(err)
		}
		c.CloseWrite()
	})
	if got, n := sum(t, c); got != wantDown {
		t.Errorf("%s: down: %d bytes of %d, or wrong ones", addr, n, size)
	}
	wg.Wait()
	<-served
}

func TestTCPHalfClose(t *testing.T) {
	b := newBed(t, usual)
	t.Run("container first", func(t *testing.T) {
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			all, _ := io.ReadAll(c)
			c.Write(bytes.ToUpper(all))
		})
		c := b.mustDial(t, "tcp", to).(*net.TCPConn)
		c.Write([]byte("question"))
		c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != "QUESTION" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("host first", func(t *testing.T) {
		got := make(chan string, 1)
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			c.Write([]byte("hello"))
			c.CloseWrite()
			all, _ := io.ReadAll(c)
			got <- string(all)
		})
		c := b.mustDial(t, "tcp", to).(*net.TCPConn)
		all, err := io.ReadAll(c)
		if err != nil {
			t.Fatal(err)
		}
		c.Write(append(all, " yourself"...))
		c.Close()
		if g := <-got; g != "hello yourself" {
			t.Errorf("host got %q", g)
		}
	})
}

func TestTCPRefused(t *testing.T) {
	b := newBed(t, usual)
	for name, to := range map[string]netip.AddrPort{
		"nobody listens":          netip.AddrPortFrom(host4.Addr(), 1),
		"nobody listens, IPv6":    netip.AddrPortFrom(host6.Addr(), 1),
		"refused by the resolver": netip.AddrPortFrom(forbidden4, 80),
		"host has no route":       netip.MustParseAddrPort("192.0.2.1:80"),
		"host has no route, IPv6": netip.MustParseAddrPort("[2001:db8::1]:80"),
	} {
		start := time.Now()
		c, err := b.dial("tcp", to)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, want ECONNREFUSED", name, err)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("%s: took %v", name, d)
		}
		if c != nil {
			c.Close()
		}
	}
}

// A reset goes through, and does not overtake what was sent before it.
func TestTCPReset(t *testing.T) {
	b := newBed(t, usual)
	t.Run("by the host", func(t *testing.T) {
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 4))
			c.SetLinger(0)
		})
		c := b.mustDial(t, "tcp", to)
		c.Write([]byte("ping"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want ECONNRESET", err)
		}
	})
	t.Run("by the container", func(t *testing.T) {
		result := make(chan error, 1)
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
				result <- fmt.Errorf("before the reset: %w", err)
				return
			}
			_, err := c.Read(make([]byte, 1))
			result <- err
		})
		c := b.mustDial(t, "tcp", to).(*net.TCPConn)
		c.Write([]byte("last"))
		c.SetLinger(0)
		c.Close()
		if err := <-result; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("host's read: %v, want ECONNRESET", err)
		}
	})
	t.Run("by the container, after its FIN", func(t *testing.T) {
		result := make(chan error, 1)
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			io.ReadAll(c)
			// The container has closed its socket: what comes now is answered with a reset.
			var err error
			for err == nil {
				_, err = c.Write(make([]byte, 1024))
			}
			result <- err
		})
		c := b.mustDial(t, "tcp", to).(*net.TCPConn)
		c.Write([]byte("last"))
		c.Close()
		if err := <-result; os.IsTimeout(err) {
			t.Errorf("host's write: %v, want a reset", err)
		}
	})
}

// echoTCP sends back what comes. (io.Copy would splice, and leave pipes that look like leaked descriptors.)
func echoTCP(c *net.TCPConn) {
	io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
}

// A thousand connections at a time, each of which works.
func TestTCPMany(t *testing.T) {
	b := newBed(t, usual)
	to := listenTCP(t, host4.Addr(), echoTCP)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)

	const many = 1000
	conns := make(chan net.Conn, many)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			for range many / 10 {
				c, err := b.dial("tcp", to)
				if err != nil {
					t.Error(err)
					continue
				}
				conns <- c
			}
		})
	}
	wg.Wait()
	close(conns)
	i := 0
	for c := range conns {
		i++
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(10 * time.Second))
		want := fmt.Sprintf("message %d", i)
		got := make([]byte, len(want))
		if _, err := c.Write([]byte(want)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	// Three sockets and eight goroutines each; what matters is that nobody keeps buffers.
	per := int64(after.HeapAlloc+after.StackInuse-before.HeapAlloc-before.StackInuse) / many
	t.Logf("%d bytes for an idle connection and its ends", per)
	if per > 100<<10 {
		t.Errorf("%d bytes for an idle connection", per)
	}
}
