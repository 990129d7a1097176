package forward

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
)

// BenchmarkUDP is exchanges of 64 datagrams of 1 KiB at a time, from one client.
func BenchmarkUDP(b *testing.B) {
	const burst = 64
	for _, host := range []string{"127.0.0.1", ""} {
		b.Run(map[bool]string{true: "everywhere", false: "one address"}[host == ""], func(b *testing.B) {
			local := freePort(b, host)
			start(b, newFake(), gvproxy.UDP, local, udpMachine(b, "127.0.0.1"), nil)
			conn := dial(b, "udp", port(b, "127.0.0.1", local))
			conn.(*net.UDPConn).SetReadBuffer(4 << 20)
			text, buffer := []byte(strings.Repeat("x", 1024)), make([]byte, 2048)
			conn.SetDeadline(time.Now().Add(time.Hour))
			b.ReportAllocs()
			b.SetBytes(burst * int64(len(text)))
			for b.Loop() {
				for range burst {
					if _, err := conn.Write(text); err != nil {
						b.Fatal(err)
					}
				}
				for range burst {
					if _, err := conn.Read(buffer); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
