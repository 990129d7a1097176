package usermode

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// listenUDP echoes datagrams on the host.
func listenUDP(t testing.TB, addr netip.Addr) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.WriteToUDPAddrPort(buf[:n], from)
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// echoDatagram sends b and expects it back.
func echoDatagram(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	got := make([]byte, maxDatagram)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(got)
	if err != nil {
		t.Fatalf("%d bytes: %v", len(b), err)
	}
	if !bytes.Equal(got[:n], b) {
		t.Fatalf("%d bytes went, %d came back or were not the same", len(b), n)
	}
}

func TestUDPEcho(t *testing.T) {
	for _, v := range []variant{usual, {1280, true}, {65520, true}, {1500, false}} {
		t.Run(v.String(), func(t *testing.T) {
			b := newBed(t, v)
			for _, addr := range []netip.Addr{host4.Addr(), host6.Addr()} {
				c := b.mustDial(t, "udp", listenUDP(t, addr))
				// Less than a packet, exactly one, fragments, and the longest there is for IPv4.
				for _, size := range []int{0, 1, 600, v.mtu - 28, v.mtu - 27, 8000, 60000, 65507} {
					want, _ := io.ReadAll(noise(byte(size), int64(size)))
					echoDatagram(t, c, want)
				}
			}
		})
	}
}

// Queries as a resolver sends them: a new socket for each.
func TestUDPManyFlows(t *testing.T) {
	b := newBed(t, usual)
	to := listenUDP(t, host4.Addr())
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 100 {
				c, err := b.dial("udp", to)
				if err != nil {
					t.Error(err)
					return
				}
				want := fmt.Sprintf("query %d of %d", j, i)
				got := make([]byte, 100)
				c.SetDeadline(time.Now().Add(5 * time.Second))
				c.Write([]byte(want))
				if n, err := c.Read(got); err != nil || string(got[:n]) != want {
					t.Errorf("got %q, %v", got[:n], err)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
}

// Whoever sends to a closed port learns it, also after datagrams that went well.
func TestUDPRefused(t *testing.T) {
	b := newBed(t, usual)
	for name, c := range map[string]struct {
		to   netip.AddrPort
		want syscall.Errno
	}{
		"nobody listens":          {netip.AddrPortFrom(host4.Addr(), 9), syscall.ECONNREFUSED},
		"nobody listens, IPv6":    {netip.AddrPortFrom(host6.Addr(), 9), syscall.ECONNREFUSED},
		"refused by the resolver": {netip.AddrPortFrom(forbidden4, 53), syscall.EHOSTUNREACH}, // administratively prohibited
		"host has no route":       {netip.MustParseAddrPort("192.0.2.1:53"), syscall.ECONNREFUSED},
		"the host's broadcast":    {netip.MustParseAddrPort("10.200.9.255:9"), syscall.ECONNREFUSED},
	} {
		to, want := c.to, c.want
		t.Run(name, func(t *testing.T) {
			c := b.mustDial(t, "udp", to)
			for range 2 {
				c.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err := c.Write([]byte("anybody?")); err != nil {
					t.Fatal(err)
				}
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, want) {
					t.Errorf("read: %v, want %v", err, want)
				}
			}
		})
	}
}

// A flow that is idle goes; one that is used, in either direction, stays.
func TestUDPIdle(t *testing.T) {
	s := newTestStack(t)
	s.flows.idle = 200 * time.Millisecond
	s.flows.idleDNS = 20 * time.Millisecond
	s.start(t)
	to := listenUDP(t, host4.Addr())
	for i := range 4 {
		s.send(t, udpPacket(guest4.Addr(), 1000, to, []byte{byte(i)}))
		s.expect(t, udp.ProtocolNumber)
		if n := s.flows.open.Load(); n != 1 {
			t.Fatalf("%d flows for one exchange", n)
		}
		time.Sleep(100 * time.Millisecond) // two of them are the idle time; a flow that is used must outlive it
	}
	s.send(t, udpPacket(guest4.Addr(), 1000, netip.AddrPortFrom(host4.Addr(), dnsPort), []byte("query")))
	eventually(t, "idle flows are gone", func() bool { return s.flows.open.Load() == 0 })
}

// A flow that nobody ever answers goes before one that is silent for a while.
func TestUDPOneWayIdle(t *testing.T) {
	s := newTestStack(t)
	s.flows.oneWay = 20 * time.Millisecond
	s.flows.idleDNS = 20 * time.Millisecond // or nobody looks for long
	stop := s.start(t)
	silent, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(host4.Addr(), 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	to := listenUDP(t, host4.Addr())
	s.send(t, udpPacket(guest4.Addr(), 1000, to, nil))
	s.expect(t, udp.ProtocolNumber)
	s.send(t, udpPacket(guest4.Addr(), 1001, silent.LocalAddr().(*net.UDPAddr).AddrPort(), nil))
	eventually(t, "the flow is there", func() bool { return s.flows.open.Load() == 2 })
	eventually(t, "the flow without answers is gone", func() bool { return s.flows.open.Load() == 1 })
	stop()
	if s.flows.flows[flowKey{netip.AddrPortFrom(guest4.Addr(), 1000), to}] == nil {
		t.Error("the flow with answers went as well")
	}
}

// One container cannot take the place of others, and the flow that has been silent for longest goes first.
func TestUDPLimits(t *testing.T) {
	s := newTestStack(t)
	s.flows.each, s.flows.total = 3, 4
	stop := s.start(t)
	to := listenUDP(t, host4.Addr())
	other := guest4.Addr().Next()
	s.send(t, udpPacket(other, 1, to, nil))
	s.expect(t, udp.ProtocolNumber)
	for port := uint16(1); port <= 10; port++ {
		s.send(t, udpPacket(guest4.Addr(), port, to, nil))
		s.expect(t, udp.ProtocolNumber)
		s.send(t, udpPacket(guest4.Addr(), 1, to, nil)) // stays in use
		s.expect(t, udp.ProtocolNumber)
	}
	// The table is full: a third container takes a place of the one that has most.
	third := other.Next()
	s.send(t, udpPacket(third, 1, to, nil))
	s.expect(t, udp.ProtocolNumber)
	stop()
	got := map[netip.Addr]int{}
	for addr, c := range s.flows.clients {
		got[addr] = len(c.flows)
	}
	if len(got) != 3 || got[guest4.Addr()] != 2 || got[other] != 1 || got[third] != 1 {
		t.Errorf("flows: %v; want 2 of the busy container and 1 of each other", got)
	}
	if s.flows.flows[flowKey{netip.AddrPortFrom(guest4.Addr(), 1), to}] == nil {
		t.Error("the flow that is in use went")
	}
	if n := s.flows.evicted.Load(); n != 8 {
		t.Errorf("%d evictions counted, want 8", n)
	}
}
