package portmap

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// The figures of these benchmarks stand for themselves only beside others of the same minute. Clients and containers have
// namespaces of their own, with a veth pair each, so that what is sent takes the kernel's way and not a short cut.

// neighbours makes the namespaces of a client and of a container; host is our address to the former, server the latter's.
func neighbours(b *testing.B) (outside, within *netns.NS, host, server netip.Addr) {
	outside, within = nettest.NewNS(b), nettest.NewNS(b)
	nettest.Veth(b, "host0", netip.MustParsePrefix("10.200.1.1/24"), outside, "client0", netip.MustParsePrefix("10.200.1.9/24"))
	nettest.Veth(b, "host1", netip.MustParsePrefix("10.200.2.1/24"), within, "server0", netip.MustParsePrefix("10.200.2.2/24"))
	return outside, within, netip.MustParseAddr("10.200.1.1"), netip.MustParseAddr("10.200.2.2")
}

// benchPair is a client and a container's server with a published port between them, bare blocking sockets that are
// connected to each other through one flow.
func benchPair(b *testing.B) (client, server int) {
	b.Helper()
	outside, within, host, target := neighbours(b)
	server = in(b, within, func() (int, error) { return benchSocket(netip.AddrPortFrom(target, 5000), netip.AddrPort{}) })
	f, err := newMapper(b).Publish(Request{Port: usernet.Port{Proto: usernet.UDP, ContainerPort: 5000}, Addr4: target, Dialer: Host{}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { closeSoon(b, f) })
	client = in(b, outside, func() (int, error) {
		return benchSocket(netip.AddrPort{}, netip.AddrPortFrom(host, f.Port().HostPort))
	})
	b.Cleanup(func() { unix.Close(client); unix.Close(server) })
	var from unix.Sockaddr
	eventually(b, "flow", func() bool { // not before the devices have found out that they are connected
		unix.Write(client, []byte("hello"))
		_, from, err = unix.Recvfrom(server, make([]byte, 10), 0)
		return err == nil
	})
	if err := unix.Connect(server, from); err != nil {
		b.Fatal(err)
	}
	return client, server
}

func benchSocket(at, to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	roomy(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, listenerBuffer)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000})
	if at.IsValid() {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())})
	}
	if to.IsValid() {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	}
	return fd, err
}

// BenchmarkUDPExchange is 100 bytes to an echo server and back, a number of them at a time in one flow.
func BenchmarkUDPExchange(b *testing.B) {
	for _, outstanding := range []int{1, 16} {
		b.Run(fmt.Sprintf("outstanding=%d", outstanding), func(b *testing.B) {
			client, server := benchPair(b)
			var stopped atomic.Bool
			var echo sync.WaitGroup
			echo.Go(func() {
				for buf := make([]byte, 2000); !stopped.Load(); {
					if n, err := unix.Read(server, buf); err == nil {
						unix.Write(server, buf[:n])
					}
				}
			})
			buf := make([]byte, 100)
			lost, start := 0, cpuTime()
			for under := 0; b.Loop(); {
				for ; under < outstanding; under++ {
					unix.Write(client, buf)
				}
				if _, err := unix.Read(client, buf); err != nil {
					lost += under
					under = 1
				}
				under--
			}
			report(b, "exchanges", b.N, lost, start)
			stopped.Store(true)
			echo.Wait()
		})
	}
}

// BenchmarkUDPOneWay is datagrams of 1200 bytes in one flow, sent one by one or in bursts as QUIC does.
func BenchmarkUDPOneWay(b *testing.B) {
	for _, way := range []string{"in", "out"} {
		for _, burst := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/burst=%d", way, burst), func(b *testing.B) {
				from, to := benchPair(b)
				if way == "out" {
					from, to = to, from
				}
				oneWay(b, from, to, burst)
			})
		}
	}
}

// oneWay sends b.N datagrams, and so many at a time that the way is busy and does not overflow.
func oneWay(b *testing.B, from, to, burst int) {
	const window, size = 256, 1200
	arrived := make(chan int, 1024)
	var stopped atomic.Bool
	var receiver sync.WaitGroup
	receiver.Go(func() {
		box := new(inbox)
		box.init()
		for !stopped.Load() {
			waitReadable(to)
			if n, err := box.receive(to); err == nil {
				arrived <- n
			}
		}
	})
	data := make([]byte, burst*size)
	r := &route{fd: from}
	var out outbox
	lost, start := 0, cpuTime()
	for under := 0; b.Loop(); under++ {
		if under%burst == 0 {
			for under+burst > window {
				select {
				case n := <-arrived:
					under -= n
				case <-time.After(200 * time.Millisecond):
					lost += under
					under = 0
				}
			}
			out.open(r)
			out.add(data, size)
			out.flush()
		}
	}
	report(b, "datagrams", b.N, lost, start)
	stopped.Store(true)
	receiver.Wait()
}

func waitReadable(fd int) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	unix.Poll(p, 20)
}

// report adds up n operations of which some were lost; start is when cpuTime was asked.
func report(b *testing.B, what string, n, lost int, start time.Duration) {
	b.ReportMetric(float64(n-lost)/b.Elapsed().Seconds(), what+"/s")
	b.ReportMetric(float64(lost)/float64(n), "lost")
	b.ReportMetric(float64(cpuTime()-start)/float64(n), "ns-cpu/op")
	b.ReportMetric(0, "ns/op")
}

// cpuTime is what the process has used, both ends included.
func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkUDPNewFlow is a first datagram and its echo, each of a new client.
func BenchmarkUDPNewFlow(b *testing.B) {
	m := newMapper(b)
	to := net.UDPAddrFromAddrPort(at(mustPublish(b, m, udpPort(udpEcho(b, container)), Host{}), "127.0.0.1"))
	buf := make([]byte, 100)
	for b.Loop() {
		c, err := net.DialUDP("udp", nil, to)
		if err != nil {
			b.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		c.Write(buf)
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
