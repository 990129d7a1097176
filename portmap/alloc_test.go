//go:build !race

package portmap

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
)

// Under the race detector sync.Pool drops items on purpose, hence the build tag.
func TestUDPSteadyStateDoesNotAllocate(t *testing.T) {
	m := newMapper(t)
	f := mustPublish(t, m, udpPort(udpEcho(t, container)), Host{})
	for _, host := range []string{"127.0.0.1", "::1"} {
		c := udpClient(t, at(f, host))
		buf := make([]byte, 1200)
		exchange := func() {
			c.Write(buf)
			c.Read(buf)
		}
		exchange()
		if n := testing.AllocsPerRun(1000, exchange); n > 0 {
			t.Errorf("through %s: %v allocations for each exchange, want none", host, n)
		}
	}
}

// Once, every flow had a goroutine, and a buffer of 64 KiB while it handled a datagram.
func TestUDPIdleFlowAllocatesLittle(t *testing.T) {
	const flows, limit = 1000, 2048 // bytes for each
	m := newMapper(t)
	server := udpServer(t, container, 0)
	f := mustPublish(t, m, udpPort(addrPort(server.LocalAddr()).Port()), Host{})
	var clients [flows]int // bare ones: what package net needs for them is not the flows'
	for i := range clients {
		fd, err := socketUDP(container)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		clients[i] = fd
	}
	to := splice.Sockaddr(at(f, "127.0.0.1"))
	say := func(clients []int) {
		for _, fd := range clients {
			if err := unix.Sendto(fd, []byte("hello"), 0, to); err != nil {
				t.Fatal(err)
			}
			if _, _, err := server.ReadFromUDPAddrPort(make([]byte, 10)); err != nil {
				t.Fatal(err)
			}
		}
	}
	say(clients[:1])
	before := memory()
	say(clients[1:])
	if n := f.Stats().Active; n != flows {
		t.Fatalf("%d flows", n)
	}
	each := (memory() - before) / (flows - 1)
	t.Logf("an idle flow needs %d bytes", each)
	if each > limit {
		t.Errorf("an idle flow needs %d bytes, want no more than %d", each, limit)
	}
}

// memory is what goroutines' stacks and live objects take.
func memory() int {
	for range 5 { // a pool takes two to be empty, and what is in use may come back to it meanwhile
		runtime.GC()
	}
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int(s.HeapAlloc + s.StackInuse)
}
