package usermode

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// established counts the TCP connections that a namespace's kernel has.
func established(t *testing.T, ns *netns.NS) (n int) {
	t.Helper()
	err := ns.Do(func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(b)) {
				if f := strings.Fields(line); len(f) > 3 && f[3] == "01" {
					n++
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// eachPath runs a test with TCP on the fast path and in netstack: the containers must not notice a difference.
func eachPath(t *testing.T, test func(t *testing.T, g *Gateway, ns *netns.NS)) {
	for _, fast := range []bool{true, false} {
		t.Run(fmt.Sprintf("fastpath=%t", fast), func(t *testing.T) {
			cfg := testConfig(t.TempDir())
			cfg.FastPath = fast
			g := openFabric(t, cfg)
			if ok, err := g.FastPath(); ok != fast {
				t.Fatalf("fast path: %t, %v, want %t", ok, err, fast)
			}
			nettest.Host(t, host4, host6)
			addBridge(t, g)
			ns := addContainer(t, g, "c1", container4, container6)
			runGateway(t, g)
			test(t, g, ns)
		})
	}
}

func TestPathIsTheOneAskedFor(t *testing.T) {
	eachPath(t, func(t *testing.T, g *Gateway, ns *netns.NS) {
		for _, addr := range []netip.Addr{host4.Addr(), host6.Addr()} {
			c, err := dialFrom(ns, "tcp", listenTCP(t, addr, echoTCP), 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			answered(t, c, "hello")
			want := 0
			if g.fast != nil {
				want = 1
			}
			if got := established(t, g.Netns()); got != want {
				t.Errorf("%s: the fabric's kernel has %d connections, want %d", addr, got, want)
			}
			if s := g.Stats(); s.Conns != 1 || s.Pending != 0 || s.Refused != 0 {
				t.Errorf("%s: %+v, want one connection", addr, s)
			}
			c.Close()
			for deadline := time.Now().Add(5 * time.Second); established(t, g.Netns()) > 0; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%s: the connection is left in the fabric", addr)
				}
			}
		}
		if g.fast != nil {
			for deadline := time.Now().Add(5 * time.Second); held(g.fast) != [3]int{}; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("openings, connections and pending ones left: %v", held(g.fast))
				}
			}
		}
	})
}

// held is how many openings there are, how many connections, and how many of them are being made.
func held(p *fastPath) [3]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	made, _ := p.made.Counts()
	pending, _ := p.pending.Counts()
	return [3]int{len(p.openings), made, pending}
}

// What the destination refuses is refused in the container: not established and then reset.
func TestRefusedDestinationIsRefused(t *testing.T) {
	eachPath(t, func(t *testing.T, _ *Gateway, ns *netns.NS) {
		for _, addr := range []netip.Addr{host4.Addr(), host6.Addr()} {
			_, err := dialFrom(ns, "tcp", netip.AddrPortFrom(addr, 1), 5*time.Second)
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %v, want a refusal", addr, err)
			}
		}
		// What the host has no route to as well, as IPv6 on most hosts: the client tries its next address.
		if _, err := dialFrom(ns, "tcp", netip.MustParseAddrPort("[2001:db8::1]:80"), 5*time.Second); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("unreachable: %v, want a refusal", err)
		}
	})
}

func TestHalfCloseAndReset(t *testing.T) {
	eachPath(t, func(t *testing.T, _ *Gateway, ns *netns.NS) {
		// The server answers when it has seen the end of the request.
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			defer c.Close()
			b, err := io.ReadAll(c)
			if err == nil {
				c.Write(append([]byte("got "), b...))
			}
		})
		c, err := dialFrom(ns, "tcp", to, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, "request")
		c.(*net.TCPConn).CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "got request" {
			t.Errorf("answer %q, %v", b, err)
		}

		ended := make(chan error, 1)
		to = listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			_, err := io.Copy(io.Discard, c)
			ended <- err
			c.Close()
		})
		c, err = dialFrom(ns, "tcp", to, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "half a request")
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
		select {
		case err := <-ended:
			if !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the server saw %v, want a reset", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("the reset did not reach the server")
		}
	})
}

func TestManyConnectionsAtOnce(t *testing.T) {
	eachPath(t, func(t *testing.T, g *Gateway, ns *netns.NS) {
		to := listenTCP(t, host4.Addr(), echoTCP)
		const n = 300
		errs := make(chan error, n)
		for range n {
			go func() {
				c, err := dialFrom(ns, "tcp", to, 10*time.Second)
				if err != nil {
					errs <- err
					return
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(10 * time.Second))
				b := []byte("hello")
				if _, err = c.Write(b); err == nil {
					_, err = io.ReadFull(c, b)
				}
				errs <- err
			}()
		}
		for range n {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
	})
}

// A segment of no connection at all must not reach the listener, and a connection that nobody waits for is refused.
func TestListenerTakesNothingUnasked(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.FastPath = true
	g := openFabric(t, cfg)
	addBridge(t, g)
	ns := addContainer(t, g, "c1", container4, container6)
	runGateway(t, g)
	port := g.fast.listeners[0].at.Port()
	if c, err := dialFrom(ns, "tcp", netip.AddrPortFrom(gateway4.Addr(), port), time.Second); err == nil {
		c.Close()
		t.Error("a container reached the fast path's listener at the gateway's address")
	}
}
