package usermode

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/rights"
)

// packetPair is two ends of a SOCK_SEQPACKET pair.
func packetPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	a, f, err := rights.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err = rights.Conn(f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// lend lends ns as a fabric until the other end is closed, and returns that.
func lend(t *testing.T, ns *netns.NS, cfg Config) *net.UnixConn {
	t.Helper()
	inside, outside := packetPair(t)
	result := make(chan error, 1)
	go func() {
		result <- ns.Do(func() error { return Lend(cfg, inside, func() error { return nil }) })
		inside.Close()
	}()
	t.Cleanup(func() {
		outside.Close()
		if err := <-result; err != nil {
			t.Errorf("lend: %v", err)
		}
	})
	return outside
}

// A fabric that another process lends serves like one's own, both ways.
func TestBorrowedFabric(t *testing.T) {
	nettest.NoLeaks(t)
	ns := nettest.NewNS(t)
	cfg := testConfig("")
	cfg.FastPath = true
	g, err := Borrow(cfg, lend(t, ns, cfg))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for name, what := range map[string]func() (bool, error){"transparent": g.Transparent, "fast": g.FastPath} {
		if ok, err := what(); !ok {
			t.Errorf("not %s: %v", name, err)
		}
	}
	g.netns = ns // for the tests' own helpers
	nettest.Host(t, host4, host6)
	addBridge(t, g)
	container := addContainer(t, g, "c1", container4, container6)
	g.netns = nil
	defer runGateway(t, g)()
	for _, addr := range []netip.Addr{host4.Addr(), host6.Addr()} {
		c, err := dialFrom(container, "tcp", listenTCP(t, addr, echoTCP), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		answered(t, c, "hello")
		c.Close()
	}
	for _, f := range families {
		l := listen(t, container, f.tcp, f.container)
		for range 2 * socketBatch {
			c, err := dialTCP(g, f.client, f.container)
			if err != nil {
				t.Fatal(err)
			}
			if got := peerOf(t, l, c, true); got.Addr() != f.client.Addr() {
				t.Fatalf("the container saw %s, want %s", got, f.client)
			}
		}
		c, err := dialUDP(g, f.client, f.container)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if err := g.Repair(); err != nil {
		t.Error(err)
	}
}

func TestLendFails(t *testing.T) {
	inside, outside := packetPair(t)
	ns := nettest.NewNS(t)
	broken := errors.New("no container")
	lender := make(chan error, 1)
	go func() {
		lender <- ns.Do(func() error { return Lend(testConfig(""), inside, func() error { return broken }) })
	}()
	defer func() { <-lender }()
	if _, err := Borrow(testConfig(""), outside); err == nil || err.Error() != broken.Error() {
		t.Errorf("borrowed: %v, want %v", err, broken)
	}
	closed, alone := packetPair(t)
	closed.Close()
	if _, err := Borrow(testConfig(""), alone); err == nil {
		t.Error("borrowed from nobody")
	}
}
