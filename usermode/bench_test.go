package usermode

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/nettest"
)

// benchPaths are the ways from a container to the host that are compared: netstack, and the kernel alone.
func benchPaths(b *testing.B, f func(b *testing.B, dial func(network string, to netip.AddrPort) (net.Conn, error), host netip.Addr)) {
	for _, v := range []variant{usual, {65520, true}, {65520, false}, {1500, false}} {
		b.Run(v.String(), func(b *testing.B) {
			bed := newBed(b, v)
			f(b, bed.dial, host4.Addr())
		})
	}
	b.Run("veth", func(b *testing.B) {
		ns := nettest.NewNS(b)
		here := netip.MustParsePrefix("10.200.10.1/24")
		nettest.Veth(b, "vethhost", here, ns, "eth0", netip.MustParsePrefix("10.200.10.2/24"))
		f(b, (&bed{container: ns}).dial, here.Addr())
	})
}

const benchChunk = 256 << 10

func BenchmarkTCPUp(b *testing.B) {
	benchPaths(b, func(b *testing.B, dial func(string, netip.AddrPort) (net.Conn, error), host netip.Addr) {
		done := make(chan struct{})
		to := listenTCP(b, host, func(c *net.TCPConn) { drain(c); close(done) })
		c, err := dial("tcp", to)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(benchChunk)
		b.ReportAllocs()
		chunk := make([]byte, benchChunk)
		for b.Loop() {
			if _, err := c.Write(chunk); err != nil {
				b.Fatal(err)
			}
		}
		c.Close()
		<-done
	})
}

func BenchmarkTCPDown(b *testing.B) {
	benchPaths(b, func(b *testing.B, dial func(string, netip.AddrPort) (net.Conn, error), host netip.Addr) {
		to := listenTCP(b, host, func(c *net.TCPConn) {
			chunk := make([]byte, benchChunk)
			for {
				if _, err := c.Write(chunk); err != nil {
					return
				}
			}
		})
		c, err := dial("tcp", to)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		b.SetBytes(benchChunk)
		b.ReportAllocs()
		chunk := make([]byte, benchChunk)
		for b.Loop() {
			if _, err := io.ReadFull(c, chunk); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkTCPEcho is one byte there and back on a connection that stands.
func BenchmarkTCPEcho(b *testing.B) {
	benchPaths(b, func(b *testing.B, dial func(string, netip.AddrPort) (net.Conn, error), host netip.Addr) {
		c, err := dial("tcp", listenTCP(b, host, echoTCP))
		if err != nil {
			b.Fatal(err)
		}
		benchEcho(b, c, 1)
	})
}

// BenchmarkTCPConnect is a connection, one byte there and back, and its end.
func BenchmarkTCPConnect(b *testing.B) {
	benchPaths(b, func(b *testing.B, dial func(string, netip.AddrPort) (net.Conn, error), host netip.Addr) {
		to := listenTCP(b, host, echoTCP)
		b.ReportAllocs()
		for b.Loop() {
			c, err := dial("tcp", to)
			if err != nil {
				b.Fatal(err)
			}
			c.Write([]byte{1})
			if _, err := c.Read(make([]byte, 1)); err != nil {
				b.Fatal(err)
			}
			c.(*net.TCPConn).SetLinger(0) // or a long run is out of ports
			c.Close()
		}
	})
}

func BenchmarkUDPEcho(b *testing.B) {
	benchPaths(b, func(b *testing.B, dial func(string, netip.AddrPort) (net.Conn, error), host netip.Addr) {
		c, err := dial("udp", listenUDP(b, host))
		if err != nil {
			b.Fatal(err)
		}
		benchEcho(b, c, 64)
	})
}

func benchEcho(b *testing.B, c net.Conn, size int) {
	defer c.Close()
	b.ReportAllocs()
	c.SetDeadline(time.Now().Add(time.Minute))
	buf := make([]byte, size)
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// drain reads until the end without splicing.
func drain(c *net.TCPConn) {
	buf := make([]byte, benchChunk)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
	}
}
