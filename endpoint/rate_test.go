package endpoint_test

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// limited attaches a container of a bridge network with limits.
func limited(t *testing.T, s *endpoint.Segment, limits endpoint.Limits) (*endpoint.Link, *netns.NS) {
	t.Helper()
	ep := endpointOf(network(usernet.Bridge), 2)
	ep.IfName = "eth0"
	ns := nettest.NewNS(t)
	l, err := s.Attach(ep, endpoint.Place{Netns: ns, Addresses: []netip.Prefix{ep.Addr4}, Gateways: []netip.Addr{gateway}, Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, ns
}

// rate is how fast size bytes go from the writer to the reader, in bits per second.
func rate(t *testing.T, w, r net.Conn, size int) float64 {
	t.Helper()
	start := time.Now()
	go func() {
		if _, err := w.Write(make([]byte, size)); err != nil {
			t.Error(err)
		}
	}()
	if _, err := io.ReadFull(r, make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	return float64(size) * 8 / time.Since(start).Seconds()
}

// connect makes a TCP connection from a container to its gateway. What waits to be sent stays small, so that a
// measurement is not one of buffers.
func connect(t *testing.T, ns *netns.NS) (inside, outside net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(gateway, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = ns.Do(func() (err error) {
		inside, err = net.Dial("tcp", l.Addr().String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if outside, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{inside, outside} {
		c.(*net.TCPConn).SetWriteBuffer(64 << 10)
		c.(*net.TCPConn).SetReadBuffer(64 << 10)
		t.Cleanup(func() { c.Close() })
	}
	return inside, outside
}

func TestLimits(t *testing.T) {
	s := open(t, endpoint.Config{Network: network(usernet.Bridge)})
	const mega = 1e6
	_, ns := limited(t, s, endpoint.Limits{In: endpoint.Rate{Bits: 16 * mega, Burst: mega}, Out: endpoint.Rate{Bits: 8 * mega}})
	inside, outside := connect(t, ns)
	for _, tt := range []struct {
		name  string
		w, r  net.Conn
		limit float64
	}{{"in", outside, inside, 16 * mega}, {"out", inside, outside, 8 * mega}} {
		// The burst goes at once, and headers count.
		if got := rate(t, tt.w, tt.r, 1<<20); got > 1.3*tt.limit || got < 0.3*tt.limit {
			t.Errorf("%s: %.1f Mbit/s, want %.0f", tt.name, got/mega, tt.limit/mega)
		}
	}
}

// A burst as large as Kubernetes asks for, and a rate with a bucket that is too small for a packet, must not stop all traffic.
func TestExtremeLimits(t *testing.T) {
	s := open(t, endpoint.Config{Network: network(usernet.Bridge)})
	for _, r := range []endpoint.Rate{{Bits: 8000, Burst: 1 << 60}, {Bits: 1 << 50, Burst: 8}, {Bits: 64000, Burst: 8}} {
		l, ns := limited(t, s, endpoint.Limits{In: r, Out: r})
		inside, outside := connect(t, ns)
		rate(t, inside, outside, 1000)
		rate(t, outside, inside, 1000)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// The device that limits what a container sends is beside the link, and goes with it; if the container takes the link with it,
// with the endpoint; and if nobody knows of the endpoint, with the next look for what is left.
func TestLimitsGo(t *testing.T) {
	s := open(t, endpoint.Config{Network: network(usernet.Bridge)})
	shapers := func(want int) {
		t.Helper()
		links, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		got := 0
		for _, l := range links {
			if l.Type() == "ifb" {
				got++
			}
		}
		if got != want {
			t.Errorf("%d ifb devices, want %d", got, want)
		}
	}
	out := endpoint.Limits{Out: endpoint.Rate{Bits: 1e6}}
	l, _ := limited(t, s, out)
	shapers(1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	shapers(0)

	l, _ = limited(t, s, out)
	if err := s.Prune(nil); err != nil {
		t.Fatal(err)
	}
	shapers(1)
	host, err := netlink.LinkByName(l.HostName)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(host); err != nil {
		t.Fatal(err)
	}
	if err := s.Prune(nil); err != nil {
		t.Fatal(err)
	}
	shapers(0)
}
