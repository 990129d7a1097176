package agent

import (
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/sync/errgroup"
)

// BenchmarkAgent has the agent and a pretend gateway, whose other side is a TAP like the agent's, carry TCP between two kernels: the
// way's length is twice that of an agent alone.
func BenchmarkAgent(b *testing.B) {
	for _, old := range []bool{false, true} {
		name := map[bool]string{false: "usernet", true: "hyperkit"}[old]
		for _, mtu := range []int{1500, 65520} {
			b.Run(fmt.Sprintf("%s/%d", name, mtu), func(b *testing.B) {
				h := newHost(b)
				h.old = old
				h.serve()
				h.dhcp()
				h.mtu(mtu)
				cfg := h.config()
				cfg.MTU = mtu
				run(b, cfg).await()
				l := listenTCP(b, h.ns, gatewayIP.String()+":0")
				b.Run("up", func(b *testing.B) { stream(b, l, false) })
				b.Run("down", func(b *testing.B) { stream(b, l, true) })
				b.Run("rr", func(b *testing.B) { requests(b, l) })
			})
		}
	}
}

const chunk = 256 << 10

// pair is a connection from the agent's machine to l.
func pair(b *testing.B, l net.Listener) (guest, host net.Conn) {
	b.Helper()
	guest, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { guest.Close() })
	if host, err = l.Accept(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { host.Close() })
	return guest, host
}

func stream(b *testing.B, l net.Listener, down bool) {
	from, to := pair(b, l)
	if down {
		from, to = to, from
	}
	b.SetBytes(chunk)
	b.ReportAllocs()
	b.ResetTimer()
	var g errgroup.Group
	g.Go(func() error {
		buf := make([]byte, chunk)
		for range b.N {
			if _, err := from.Write(buf); err != nil {
				return err
			}
		}
		return nil
	})
	buf := make([]byte, chunk)
	for range b.N {
		if _, err := io.ReadFull(to, buf); err != nil {
			b.Fatal(err)
		}
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
}

func requests(b *testing.B, l net.Listener) {
	guest, host := pair(b, l)
	var g errgroup.Group
	g.Go(func() error {
		var buf [1]byte
		for range b.N {
			if _, err := io.ReadFull(host, buf[:]); err != nil {
				return err
			}
			if _, err := host.Write(buf[:]); err != nil {
				return err
			}
		}
		return nil
	})
	b.ResetTimer()
	var buf [1]byte
	for range b.N {
		if _, err := guest.Write(buf[:]); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(guest, buf[:]); err != nil {
			b.Fatal(err)
		}
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
}
