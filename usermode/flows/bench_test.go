//go:build linux

package flows

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkExchange is datagrams to an echo server on loopback and back: so many flows, with so many exchanges under way
// in each. "goroutines" is the usual way, for comparison: a goroutine for each flow that reads with package net.
func BenchmarkExchange(b *testing.B) {
	for _, v := range []struct{ flows, underWay int }{{1, 1}, {1, 8}, {16, 1}, {16, 8}, {1000, 1}} {
		name := strconv.Itoa(v.flows) + "x" + strconv.Itoa(v.underWay)
		b.Run("flows/"+name, func(b *testing.B) { benchExchange(b, v.flows, v.underWay, ours) })
		b.Run("goroutines/"+name, func(b *testing.B) { benchExchange(b, v.flows, v.underWay, goroutines) })
	}
}

// carrier carries datagrams on, and calls back with the answers.
type carrier func(b *testing.B, answer func(client netip.AddrPort)) (send func(client, dst netip.AddrPort))

func ours(b *testing.B, answer func(netip.AddrPort)) func(client, dst netip.AddrPort) {
	f := New(Config{
		Resolve: resolve,
		SendUDP: func(_, to netip.AddrPort, payloads [][]byte) {
			for range payloads {
				answer(to)
			}
		},
		SendICMP: func(netip.Addr, netip.Addr, []byte) { b.Error("an ICMP error") },
		Log:      slog.New(slog.DiscardHandler),
	})
	run(b, f)
	quoted := putUDP(make([]byte, ipv4HdrLen+udpHdrLen), netip.AddrPortFrom(guest4, 1), netip.AddrPortFrom(alias4, 1), 64)
	parts := [][]byte{make([]byte, 64)}
	return func(client, dst netip.AddrPort) { f.UDP(client, dst, 64, quoted, parts) }
}

func goroutines(b *testing.B, answer func(netip.AddrPort)) func(client, dst netip.AddrPort) {
	var mu sync.Mutex
	conns := make(map[netip.AddrPort]*net.UDPConn)
	b.Cleanup(func() {
		for _, c := range conns {
			c.Close()
		}
	})
	payload := make([]byte, 64)
	return func(client, dst netip.AddrPort) {
		mu.Lock()
		c := conns[client]
		if c == nil {
			host, _ := resolve(dst.Addr())
			var err error
			if c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(host, dst.Port()))); err != nil {
				b.Error(err)
				mu.Unlock()
				return
			}
			conns[client] = c
			go func() {
				buf := make([]byte, 65536)
				for {
					c.SetReadDeadline(time.Now().Add(udpIdle))
					if _, err := c.Read(buf); err != nil {
						return
					}
					answer(client)
				}
			}()
		}
		mu.Unlock()
		c.Write(payload)
	}
}

func benchExchange(b *testing.B, flows, underWay int, carry carrier) {
	dst := netip.AddrPortFrom(alias4, echoServer(b, local4).Port())
	var left, done atomic.Int64
	left.Store(int64(b.N))
	finished := make(chan struct{})
	var send func(client, dst netip.AddrPort)
	next := func(client netip.AddrPort) {
		if left.Add(-1) >= 0 {
			send(client, dst)
		}
	}
	send = carry(b, func(client netip.AddrPort) {
		next(client)
		if done.Add(1) == int64(b.N) {
			close(finished)
		}
	})
	b.ReportAllocs()
	b.ResetTimer()
	before := processor(b)
	for i := range flows {
		for range underWay {
			next(netip.AddrPortFrom(guest4, uint16(i+1)))
		}
	}
	select {
	case <-finished:
	case <-time.After(time.Minute):
		b.Fatalf("%d of %d came back", done.Load(), b.N)
	}
	b.ReportMetric(float64((processor(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op") // the server's are among them
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "exchanges/s")
}

// BenchmarkIdleFlow is the memory of a flow of the process, of ten thousand that each had an answer.
func BenchmarkIdleFlow(b *testing.B) {
	const flows = 10000
	dst := netip.AddrPortFrom(alias4, echoServer(b, local4).Port())
	answers := make(chan struct{}, 100)
	f := New(Config{
		Resolve:  resolve,
		SendUDP:  func(_, _ netip.AddrPort, _ [][]byte) { answers <- struct{}{} },
		SendICMP: func(netip.Addr, netip.Addr, []byte) {},
		Log:      slog.New(slog.DiscardHandler),
	})
	f.udp.each = flows
	run(b, f)
	payload := [][]byte{make([]byte, 64)}
	exchange := func(i int) {
		f.UDP(netip.AddrPortFrom(guest4, uint16(i+1)), dst, 64, nil, payload)
		<-answers
	}
	exchange(0)
	before := resident(b)
	for b.Loop() {
		start := time.Now()
		for i := range flows {
			exchange(i)
		}
		b.ReportMetric(float64(time.Since(start).Microseconds())/flows, "µs/flow")
		b.ReportMetric(float64(resident(b)-before)/flows, "B/flow")
		f.udp.accept(false)
		f.udp.accept(true)
	}
}

// resident is the process's memory in bytes.
func resident(b *testing.B) int64 {
	runtime.GC()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// processor is the processor time that the process has had.
func processor(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
