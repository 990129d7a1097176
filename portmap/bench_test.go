package portmap

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/usernet/usernet"
)

// BenchmarkRoundTrip is one byte to an echo server and back, without and with a forward in between.
func BenchmarkRoundTrip(b *testing.B) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	server := addrPort(ln.Addr())
	f, err := New(slog.New(slog.DiscardHandler)).Publish(Request{
		Owner:  "bench",
		Port:   usernet.Port{Proto: usernet.TCP, HostIP: server.Addr(), ContainerPort: server.Port()},
		Addr4:  server.Addr(),
		Dialer: Host{},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for name, at := range map[string]netip.AddrPort{"direct": server, "forward": netip.AddrPortFrom(server.Addr(), f.Port().HostPort)} {
		b.Run(name, func(b *testing.B) {
			c, err := net.Dial("tcp", at.String())
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			buf := make([]byte, 1)
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
