//go:build unix

package l2

import (
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wire is frames one behind the other, as a guest writes them: about 64 KiB.
func wireOf(fr Framing, dst, src MAC, size int) (b []byte, frames int) {
	f := Frame{Head: frame(dst, src, size, 0)}
	for len(b)+size < 64<<10 || frames == 0 {
		b = appendFrame(b, fr, AllOffload, &f)
		frames++
	}
	return b, frames
}

// drainCount reads until the end and counts bytes.
func drainCount(c net.Conn, bytes *atomic.Int64) {
	buf := make([]byte, 256<<10)
	for {
		n, err := c.Read(buf)
		bytes.Add(int64(n))
		if err != nil {
			return
		}
	}
}

// BenchmarkSwitch sends from one stream port to another one. What is measured is what arrives; lost/sent is what a receiver that is
// slower than the sender costs, since nobody holds the sender back. relay is io.Copy between the same sockets.
func BenchmarkSwitch(b *testing.B) {
	for _, fr := range []Framing{HyperKit, QEMU, Usernet} {
		for _, size := range []int{64, 1514, 65534} {
			b.Run(fmt.Sprintf("%s/%d", fr, size), func(b *testing.B) {
				bed := newBed(b, Config{})
				to, from := bed.stream(1, Options{Framing: fr}, PortConfig{}), bed.stream(2, Options{Framing: fr}, PortConfig{})
				to.say(broadcast, 1)
				from.hears(1)
				pump(b, fr, size, from.conn, to.conn)
				s := to.port.Stats()
				b.ReportMetric(float64(s.Full)/float64(s.Full+s.TxFrames), "lost/sent")
			})
		}
	}
	b.Run("relay/1514", func(b *testing.B) {
		a, host1 := socketpair(b, unix.SOCK_STREAM)
		c, host2 := socketpair(b, unix.SOCK_STREAM)
		go func() {
			buf := make([]byte, 256<<10)
			io.CopyBuffer(struct{ io.Writer }{host2}, struct{ io.Reader }{host1}, buf)
		}()
		pump(b, HyperKit, 1514, a, c)
		host1.Close()
	})
}

func pump(b *testing.B, fr Framing, size int, from, to net.Conn) {
	wire, n := wireOf(fr, guestMAC(1), guestMAC(2), size)
	var got atomic.Int64
	done := make(chan struct{})
	go func() {
		drainCount(to, &got)
		close(done)
	}()
	b.ReportAllocs()
	b.SetBytes(int64(len(wire)))
	sent := 0
	for b.Loop() {
		if _, err := from.Write(wire); err != nil {
			b.Fatal(err)
		}
		sent++
	}
	for last := int64(-1); got.Load() != last; time.Sleep(20 * time.Millisecond) {
		last = got.Load()
	}
	arrived := float64(got.Load()) / float64(len(wire)) * float64(n)
	b.ReportMetric(arrived/b.Elapsed().Seconds()/1e6, "Mframes/s")
	b.ReportMetric(arrived*float64(size)*8/b.Elapsed().Seconds()/1e9, "Gbit/s")
	to.SetReadDeadline(time.Unix(1, 0))
	<-done
	to.Close()
	from.Close()
}

// BenchmarkExchange sends a frame to another port, whose guest sends one back. direct is the same without a switch, on one socket.
func BenchmarkExchange(b *testing.B) {
	exchange := func(b *testing.B, one, two *Link, to, from MAC) {
		there, back := []Frame{{Head: frame(to, from, 60, 1)}}, []Frame{{Head: frame(from, to, 60, 2)}}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				if _, err := two.Receive(); err != nil {
					return
				}
				two.Send(back)
			}
		}()
		for b.Loop() {
			if _, err := one.Send(there); err != nil {
				b.Fatal(err)
			}
			if _, err := one.Receive(); err != nil {
				b.Fatal(err)
			}
		}
		two.Interrupt()
		<-done
	}
	b.Run("switch", func(b *testing.B) {
		bed := newBed(b, Config{})
		one, two := bed.stream(1, Options{}, PortConfig{}), bed.stream(2, Options{}, PortConfig{})
		one.say(broadcast, 1)
		two.hears(1)
		two.say(one.mac, 1)
		one.hears(1)
		one.conn.SetReadDeadline(time.Time{})
		two.conn.SetReadDeadline(time.Time{})
		exchange(b, one.Link, two.Link, two.mac, one.mac)
	})
	b.Run("direct", func(b *testing.B) {
		a, c := socketpair(b, unix.SOCK_STREAM)
		exchange(b, Stream(a, Options{}), Stream(c, Options{}), guestMAC(2), guestMAC(1))
	})
}

// BenchmarkSegments cuts 60 KB of TCP for a port that takes no segments: as the gateway sends to a plain machine.
func BenchmarkSegments(b *testing.B) {
	f := segment(false, false, 60000, 1448)
	if err := f.check(); err != nil {
		b.Fatal(err)
	}
	var wire []byte
	b.SetBytes(60000)
	b.ReportAllocs()
	for b.Loop() {
		wire = appendFrame(wire[:0], HyperKit, 0, &f)
	}
}
