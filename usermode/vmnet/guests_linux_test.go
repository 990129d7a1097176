package vmnet

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/l2"
)

// TestReconnectUnnoticed: a machine that comes back while its old connection seems to be open, and has even filled it, is served at
// once, and so is who wants to reach it.
func TestReconnectUnnoticed(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	to := (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), echo)
	service := m.listen(t, netip.AddrPortFrom(m.addr, 0), echo)
	c, err := b.DialTCP(t.Context(), netip.AddrPort{}, service)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	exchange(t, c, "before")
	mac := m.mac()
	m.die()
	lost, err := b.DialUDP(netip.AddrPort{}, netip.AddrPortFrom(m.addr, 9))
	if err != nil {
		t.Fatal(err)
	}
	defer lost.Close()
	dead := b.sw.PortOf(mac)
	for dead.Stats().Full == 0 {
		lost.Write(make([]byte, 8000))
	}
	m.plug(b, l2.HyperKit)
	m.setMAC(mac)
	start := time.Now()
	m.setAddr()
	exchange(t, m.mustDial("tcp", to), "after")
	if d := time.Since(start); d > 10*time.Second { // an idle machine needs a few milliseconds
		t.Errorf("it took %v", d)
	}
	if p := b.sw.PortOf(mac); p == dead {
		t.Error("it is still behind its old port")
	}
	exchange(t, c, "inwards, and the connection of before")
	service = m.listen(t, netip.AddrPortFrom(m.addr, 0), echo)
	again, err := b.DialTCP(t.Context(), netip.AddrPort{}, service)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	exchange(t, again, "and a new one")
}

// mac is the address of the machine's card.
func (m *machine) mac() (mac l2.MAC) {
	m.t.Helper()
	nettest.Handle(m.t, m.ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(tapName)
		if err == nil {
			mac = l2.MAC(link.Attrs().HardwareAddr)
		}
		return err
	})
	return mac
}

func (m *machine) setMAC(mac l2.MAC) {
	m.t.Helper()
	nettest.Handle(m.t, m.ns, func(h *netlink.Handle) error {
		link, err := h.LinkByName(tapName)
		if err != nil {
			return err
		}
		return h.LinkSetHardwareAddr(link, mac[:])
	})
}

// TestServedConnections: a machine has so many connections to a port of the gateway's, whatever its addresses; more are reset, and
// others notice nothing.
func TestServedConnections(t *testing.T) {
	b := newBed(t, testConfig(t))
	m, other := b.machine(2, l2.Usernet), b.machine(3, l2.Usernet)
	m.addr6()
	l, err := b.ListenTCP(80)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var accepted []net.Conn
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			accepted = append(accepted, c)
			mu.Unlock()
			io.WriteString(c, "x")
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
		for _, c := range accepted {
			c.Close()
		}
	})
	// serves tells whether a new connection is served.
	serves := func(m *machine, at netip.Addr) bool {
		c, err := m.dial("tcp", netip.AddrPortFrom(at, 80))
		if err == nil {
			t.Cleanup(func() { c.Close() })
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v, want a reset", err)
		}
		return err == nil
	}
	for i := range maxMachineServed {
		if !serves(m, []netip.Addr{gateway, gateway6}[i%2]) {
			t.Fatalf("connection %d is reset", i+1)
		}
	}
	if serves(m, gateway) || serves(m, gateway6) {
		t.Errorf("connection %d is served", maxMachineServed+1)
	}
	if n := b.Stats().Refused; n != 2 {
		t.Errorf("%d refused, want 2", n)
	}
	if !serves(other, gateway) {
		t.Error("another machine is not served")
	}
	mu.Lock()
	accepted[0].Close()
	accepted[0].Close()
	accepted[1].(*Conn).Uncount()
	accepted[1].Close()
	mu.Unlock()
	for i, want := range []bool{true, true, false} {
		if serves(m, gateway) != want {
			t.Errorf("when two are done, connection %d is served: %t", i+1, !want)
		}
	}
}

// TestFairness has eight machines send and receive at once, beside one that reads nothing: when the fastest is done, none is far behind.
func TestFairness(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has its own idea of whose turn it is")
	}
	const machines, rounds, work = 8, 4, 24 << 20
	b := newBed(t, testConfig(t))
	b.room = 64 << 10
	stuck := b.machine(99, l2.Usernet)
	b.room = 0
	stuck.hang(b, (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), pour))

	var all []*machine
	for i := range machines {
		all = append(all, b.machine(2+i, []l2.Framing{l2.Usernet, l2.HyperKit}[i%2]))
	}
	sent, received, both := make([]int64, machines), make([]int64, machines), make([]int64, machines)
	for range rounds { // in each, a machine may lose a segment early and a good deal of time by that
		up, down := race(t, all, work)
		for i := range machines {
			sent[i] += up[i]
			received[i] += down[i]
			both[i] += up[i] + down[i]
		}
	}
	for _, way := range []struct {
		what  string
		bytes []int64
		least float64 // of the mean
	}{{"sent", sent, 0.1}, {"received", received, 0.1}, {"sent and received", both, 0.33}} {
		mean := sum(way.bytes) / machines
		low, high := float64(slices.Min(way.bytes))/float64(mean), float64(slices.Max(way.bytes))/float64(mean)
		t.Logf("%s: %d MiB, of the mean %.2f to %.2f", way.what, toMiB(way.bytes), low, high)
		if low < way.least {
			t.Errorf("a machine has %s %.2f of the mean", way.what, low)
		}
	}
}

// race has each machine send and receive, and returns what each has done when the fastest, either way, has done work.
func race(t *testing.T, machines []*machine, work int64) (sent, received []int64) {
	t.Helper()
	start, over := make(chan struct{}), make(chan struct{})
	end := sync.OnceFunc(func() { close(over) })
	ups, downs := make([]atomic.Int64, len(machines)), make([]atomic.Int64, len(machines))
	sink := func(c net.Conn, n *atomic.Int64) {
		for b := make([]byte, 64<<10); ; {
			k, err := c.Read(b)
			if err != nil {
				return
			}
			if n.Add(int64(k)) >= work {
				end()
			}
		}
	}
	var wg sync.WaitGroup
	for i, m := range machines {
		up := m.mustDial("tcp", (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), func(c net.Conn) { sink(c, &ups[i]) }))
		down := m.mustDial("tcp", (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), func(c net.Conn) { <-start; pour(c) }))
		wg.Go(func() { <-start; pour(up) })
		wg.Go(func() { sink(down, &downs[i]) })
		wg.Go(func() {
			<-over
			up.Close()
			down.Close()
		})
	}
	close(start)
	select {
	case <-over:
	case <-time.After(time.Minute):
		t.Error("not done after a minute")
		end()
	}
	for i := range machines {
		sent, received = append(sent, ups[i].Load()), append(received, downs[i].Load())
	}
	wg.Wait()
	return sent, received
}

// pour writes until nobody reads any more.
func pour(c net.Conn) {
	for b := make([]byte, 64<<10); ; {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func sum(n []int64) (all int64) {
	for _, i := range n {
		all += i
	}
	return all
}

func toMiB(n []int64) (out []int64) {
	for _, i := range n {
		out = append(out, i>>20)
	}
	return out
}
