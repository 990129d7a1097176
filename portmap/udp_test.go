package portmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/nettest"
)

func udpPort(p uint16) usernet.Port { return usernet.Port{Proto: usernet.UDP, ContainerPort: p} }

// udpServer is a pretend container's socket; it goes with the test.
func udpServer(t testing.TB, host netip.Addr, port uint16) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(host, port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// udpEcho answers every datagram with itself and returns its port.
func udpEcho(t testing.TB, host netip.Addr) uint16 {
	t.Helper()
	c := udpServer(t, host, 0)
	var wg sync.WaitGroup
	wg.Go(func() {
		for b := make([]byte, maxMessage); ; {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:n], from)
		}
	})
	t.Cleanup(func() {
		c.Close()
		wg.Wait()
	})
	return addrPort(c.LocalAddr()).Port()
}

// udpClient connects a socket to: it hears only what leaves from there.
func udpClient(t testing.TB, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// udpExchange sends b and wants it back.
func udpExchange(t testing.TB, c *net.UDPConn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, maxMessage)
	if n, err := c.Read(got); err != nil || !bytes.Equal(got[:n], b) {
		t.Fatalf("%v to %v: got %d bytes (%v), want the %d that were sent", c.LocalAddr(), c.RemoteAddr(), n, err, len(b))
	}
}

func TestUDPManyClients(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), Host{})
	const clients, rounds = 100, 20
	var wg sync.WaitGroup
	for i := range clients {
		c := udpClient(t, at(f, []string{"127.0.0.1", "127.0.0.2", "::1"}[i%3]))
		wg.Go(func() {
			got := make([]byte, 100)
			for round := range rounds {
				text := fmt.Sprintf("client %d round %d", i, round)
				c.Write([]byte(text))
				if n, err := c.Read(got); err != nil || string(got[:n]) != text {
					t.Errorf("got %q (%v), want %q", got[:n], err, text)
					return
				}
			}
		})
	}
	wg.Wait()
	if got, want := f.Stats(), (Stats{Accepted: clients, Active: clients}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestUDPSizes(t *testing.T) {
	for _, host := range []string{"", "127.0.0.1", "::1"} {
		t.Run("on "+host, func(t *testing.T) {
			m := newMapper(t)
			p := udpPort(udpEcho(t, container))
			p.HostIP = addr(host)
			if host == "" {
				host = "127.0.0.1"
			}
			c := udpClient(t, at(mustPublish(t, m, p, Host{}), host))
			for _, size := range []int{0, 1, 1472, 1473, 9000, 65507} {
				udpExchange(t, c, bytes.Repeat([]byte{'x'}, size))
			}
		})
	}
}

func TestUDPAddressFamilies(t *testing.T) {
	for _, tt := range []struct{ addr4, addr6, host, want string }{
		{"127.0.0.10", "", "::1", "127.0.0.10"},
		{"", "::1", "127.0.0.1", "::1"},
		{"127.0.0.10", "::1", "127.0.0.1", "127.0.0.10"},
		{"127.0.0.10", "::1", "::1", "::1"},
	} {
		t.Run(tt.addr4+","+tt.addr6+" from "+tt.host, func(t *testing.T) {
			m := newMapper(t)
			r := Request{Port: udpPort(udpEcho(t, addr(tt.want))), Addr4: addr(tt.addr4), Addr6: addr(tt.addr6), Dialer: Host{}}
			f, err := m.Publish(r)
			if err != nil {
				t.Fatal(err)
			}
			defer closeSoon(t, f)
			udpExchange(t, udpClient(t, at(f, tt.host)), []byte("hello"))
		})
	}
}

func TestUDPSourceIsPassedToTheDialer(t *testing.T) {
	m := newMapper(t)
	d := newSpy()
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), d)
	for _, host := range []string{"127.0.0.1", "::1"} {
		c := udpClient(t, at(f, host))
		udpExchange(t, c, []byte("hello"))
		udpExchange(t, c, []byte("again"))
		if got, want := <-d.clients, addrPort(c.LocalAddr()); got != want {
			t.Errorf("the dialer was told %v, the client is %v", got, want)
		}
	}
	if n := len(d.clients); n != 0 {
		t.Errorf("%d more flows, want one for each client", n)
	}
}

// A client on another machine speaks to the second of the host's addresses, and its socket hears only that one. The
// route back prefers the first.
func TestUDPAnswersFromTheAddressSpokenTo(t *testing.T) {
	m := newMapper(t)
	ns := nettest.NewNS(t)
	nettest.Veth(t, "host0", netip.MustParsePrefix("10.200.1.1/24"), ns, "client0", netip.MustParsePrefix("10.200.1.9/24"))
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, a := range []string{"10.200.1.2/24", "2001:db8:1::1/64", "2001:db8:1::2/64", "fe80::aa/64"} {
		if err := nettest.Addr(h, "host0", netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	nettest.Handle(t, ns, func(h *netlink.Handle) error {
		return nettest.Addr(h, "client0", netip.MustParsePrefix("2001:db8:1::9/64"))
	})
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), Host{})
	for _, host := range []string{"10.200.1.1", "10.200.1.2", "2001:db8:1::1", "2001:db8:1::2", "fe80::aa%client0"} {
		// The scope is resolved in the client's namespace.
		c := in(t, ns, func() (*net.UDPConn, error) {
			return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at(f, host)))
		})
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		udpExchange(t, c, []byte("to "+host))
	}

	// One unconnected socket that speaks to both addresses in turn hears each answer from the right one.
	c := in(t, ns, func() (*net.UDPConn, error) { return net.ListenUDP("udp4", nil) })
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	for _, host := range []string{"10.200.1.2", "10.200.1.1", "10.200.1.2"} {
		if _, err := c.WriteToUDPAddrPort([]byte("x"), at(f, host)); err != nil {
			t.Fatal(err)
		}
		if _, from, err := c.ReadFromUDPAddrPort(make([]byte, 10)); err != nil || from != at(f, host) {
			t.Errorf("the answer came from %v (%v), want %v", from, err, at(f, host))
		}
	}
}

func TestUDPBroadcastIsIgnored(t *testing.T) {
	m := newMapper(t)
	ns := nettest.NewNS(t)
	nettest.Veth(t, "host0", netip.MustParsePrefix("10.200.1.1/24"), ns, "client0", netip.MustParsePrefix("10.200.1.9/24"))
	server := udpServer(t, container, 0)
	server.SetDeadline(time.Now().Add(patience))
	f := mustPublish(t, m, udpPort(addrPort(server.LocalAddr()).Port()), Host{})
	c := in(t, ns, func() (*net.UDPConn, error) { return net.ListenUDP("udp4", nil) })
	defer c.Close()
	for _, to := range []string{"10.200.1.255", "10.200.1.1"} {
		if _, err := c.WriteToUDPAddrPort([]byte(to), at(f, to)); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, 100)
	if n, _, err := server.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "10.200.1.1" {
		t.Errorf("the container got the packet for %q (%v), want only the one for the host alone", b[:n], err)
	}
}

// A container that starts its server late: the first datagrams are answered by ICMP. The flow must live on, and the
// first datagram after that must not be lost to the pending error.
func TestUDPRefusedFlowLivesOn(t *testing.T) {
	m := newMapper(t)
	probe := udpServer(t, container, 0)
	port := addrPort(probe.LocalAddr()).Port()
	probe.Close()
	f := mustPublish(t, m, udpPort(port), Host{})
	c := udpClient(t, at(f, "127.0.0.1"))
	for range 3 {
		if _, err := c.Write([]byte("anyone?")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "flow", func() bool { return f.Stats().Active == 1 })
	server := udpServer(t, container, port)
	server.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("now?")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	var flow netip.AddrPort
	n, err := 0, error(nil)
	for string(b[:n]) != "now?" { // an early one may still have been on its way
		if n, flow, err = server.ReadFromUDPAddrPort(b); err != nil {
			t.Fatalf("the server heard nothing: %v", err)
		}
	}
	if _, err := server.WriteToUDPAddrPort(b[:n], flow); err != nil {
		t.Fatal(err)
	}
	if n, err = c.Read(b); err != nil || string(b[:n]) != "now?" {
		t.Errorf("the client heard %q, %v", b[:n], err)
	}
	if got, want := f.Stats(), (Stats{Accepted: 1, Active: 1}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

// A send alone: with no reader to take the ICMP error first, it is the send that gets it.
func TestOutboxOutlivesAnError(t *testing.T) {
	newMapper(t)
	probe := udpServer(t, container, 0)
	port := addrPort(probe.LocalAddr()).Port()
	probe.Close()
	fd, err := Host{}.DialUDP(netip.AddrPort{}, netip.AddrPortFrom(container, port))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var out outbox
	send := func(text string) {
		out.open(&route{fd: fd})
		out.add([]byte(text), len(text))
		out.flush()
	}
	send("lost") // loopback: the answer is there when this returns
	server := udpServer(t, container, port)
	server.SetDeadline(time.Now().Add(patience))
	send("kept")
	b := make([]byte, 10)
	if n, err := server.Read(b); err != nil || string(b[:n]) != "kept" {
		t.Errorf("the server read %q, %v", b[:n], err)
	}
}

func TestUDPFlowEndsWhenIdle(t *testing.T) {
	m := newMapper(t)
	m.limits.idle = 50 * time.Millisecond
	d := newSpy()
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), d)
	c := udpClient(t, at(f, "127.0.0.1"))
	for range 3 {
		udpExchange(t, c, []byte("hello"))
		eventually(t, "flow ended", func() bool { return f.Stats().Active == 0 })
	}
	if n := len(d.clients); n != 3 {
		t.Errorf("%d flows, want a new one after each expiry", n)
	}
}

// Packets of either direction keep a flow: one is kept by its client, the other by the container, for longer than
// the idle time.
func TestUDPFlowLivesWhileUsed(t *testing.T) {
	const idle = time.Second
	m := newMapper(t)
	m.limits.idle = idle
	server := udpServer(t, container, 0)
	server.SetDeadline(time.Now().Add(patience))
	f := mustPublish(t, m, udpPort(addrPort(server.LocalAddr()).Port()), Host{})
	talks, listens := udpClient(t, at(f, "127.0.0.1")), udpClient(t, at(f, "::1"))
	b := make([]byte, 10)
	var flows [2]netip.AddrPort // as the container sees them
	for i, c := range []*net.UDPConn{talks, listens} {
		c.Write([]byte("hello"))
		var err error
		if _, flows[i], err = server.ReadFromUDPAddrPort(b); err != nil {
			t.Fatal(err)
		}
	}
	tick := time.NewTicker(idle / 10)
	defer tick.Stop()
	for range 15 {
		<-tick.C
		talks.Write([]byte("tick"))
		if _, from, err := server.ReadFromUDPAddrPort(b); from != flows[0] {
			t.Fatalf("the client's came from %v (%v), want the one flow, %v", from, err, flows[0])
		}
		server.WriteToUDPAddrPort([]byte("tock"), flows[1])
		if _, err := listens.Read(b); err != nil {
			t.Fatalf("the container's: %v", err)
		}
	}
	if got, want := f.Stats(), (Stats{Accepted: 2, Active: 2}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestFlowTableClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		flows := newFlowTable(limits{flows: 10, idle: 90 * time.Second})
		f := &flow{key: flowKey{client: netip.MustParseAddrPort("192.0.2.1:5000")}}
		flows.add(f, flows.now())
		time.Sleep(60 * time.Second)
		if left := flows.left(f, flows.now()); left != 30*time.Second || flows.expired(flows.now()) != nil {
			t.Errorf("after 60 s of 90 it has %v left", left)
		}
		if flows.use(f.key, flows.now()) != f {
			t.Error("the flow is gone before its time")
		}
		time.Sleep(89 * time.Second)
		if left := flows.left(f, flows.now()); left != time.Second || flows.expired(flows.now()) != nil {
			t.Errorf("89 s after its last packet it has %v left", left)
		}
		time.Sleep(time.Second)
		if flows.expired(flows.now()) != f {
			t.Error("90 s after its last packet it has not expired")
		}
		flows.remove(f)
		if flows.use(f.key, flows.now()) != nil || flows.idlest() != nil {
			t.Error("the flow outlived its time")
		}
	})
}

func TestUDPTooManyFlowsEvictsTheIdlest(t *testing.T) {
	m := newMapper(t)
	m.limits.flows = 3
	d := newSpy()
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), d)
	var clients [4]*net.UDPConn
	for i := range clients {
		clients[i] = udpClient(t, at(f, []string{"127.0.0.1", "::1"}[i%2]))
	}
	for _, i := range []int{0, 1, 2, 0, 3, 0, 2, 3} { // 3 drives out 1
		udpExchange(t, clients[i], []byte("hello"))
	}
	eventually(t, "three flows", func() bool { return f.Stats() == Stats{Accepted: 4, Active: 3} })
	udpExchange(t, clients[1], []byte("back")) // in a new flow, and drives out 0
	eventually(t, "three flows", func() bool { return f.Stats() == Stats{Accepted: 5, Active: 3} })
}

func TestUDPDialFailureDropsTheDatagram(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), &failFirst{})
	c := udpClient(t, at(f, "127.0.0.1"))
	c.Write([]byte("lost"))
	udpExchange(t, c, []byte("kept"))
	if got, want := f.Stats(), (Stats{Accepted: 1, Active: 1, Refused: 1}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

// failFirst is a Dialer whose first DialUDP fails.
type failFirst struct {
	Host
	failed bool
}

func (d *failFirst) DialUDP(client, target netip.AddrPort) (int, error) {
	if !d.failed {
		d.failed = true
		return -1, errors.New("not yet")
	}
	return d.Host.DialUDP(client, target)
}

func TestUDPCloseDuringTraffic(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), Host{})
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var clients [20]*net.UDPConn
	for i := range clients {
		clients[i] = udpClient(t, at(f, "127.0.0.1"))
		udpExchange(t, clients[i], []byte("hello"))
	}
	for _, c := range clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				c.Write([]byte("more"))
			}
		})
	}
	closeSoon(t, f)
	stop()
	wg.Wait()
	if got := f.Stats(); got.Active != 0 {
		t.Errorf("after Close: %+v", got)
	}
	c := udpClient(t, at(f, "127.0.0.1"))
	c.Write([]byte("hello"))
	if _, err := c.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after Close the port answers %v, want connection refused", err)
	}
}
