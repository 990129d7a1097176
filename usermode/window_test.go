package usermode

import (
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// delayed puts a line between a TUN and the file that it returns, on which every packet takes its time.
func delayed(t testing.TB, tun *os.File, oneWay time.Duration) *os.File {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	var wg sync.WaitGroup
	line := func(from, to *os.File) {
		type packet struct {
			data []byte
			due  time.Time
		}
		packets := make(chan packet, 1<<16)
		wg.Go(func() {
			defer close(packets)
			for buf := make([]byte, virtioHdrLen+gsoMaxSize); ; {
				n, err := from.Read(buf)
				if err != nil {
					return
				}
				packets <- packet{append([]byte(nil), buf[:n]...), time.Now().Add(oneWay)}
			}
		})
		wg.Go(func() {
			for p := range packets {
				time.Sleep(time.Until(p.due))
				to.Write(p.data)
			}
		})
	}
	line(tun, far)
	line(far, tun)
	t.Cleanup(func() {
		tun.SetDeadline(time.Unix(1, 0))
		far.SetDeadline(time.Unix(1, 0))
		wg.Wait()
		far.Close()
		near.Close()
	})
	return near
}

// A connection fills a path of 100 ms: the windows grow. (They carry 7 MiB in a round trip, but not with the race
// detector on a busy machine.)
func TestLongPath(t *testing.T) {
	const (
		roundTrip = 100 * time.Millisecond
		want      = tcprelay.Buffer // bytes in a round trip
	)
	nettest.NoLeaks(t)
	nettest.Host(t, host4, host6)
	b := &bed{container: nettest.NewNS(t)}
	b.tun = addTestTUN(t, b.container, usual)
	if err := b.container.Do(func() error {
		return setSysctls([]sysctl{
			{name: "net/ipv4/tcp_rmem", value: "4096 131072 33554432"},
			{name: "net/ipv4/tcp_wmem", value: "4096 131072 33554432"},
		})
	}); err != nil {
		t.Fatal(err)
	}
	s, err := newNetstack(testNetstackConfig(t, usual))
	if err != nil {
		t.Fatal(err)
	}
	runNetstack(t, s, delayed(t, b.tun, roundTrip/2))
	// grown tells whether a connection's buffer has outgrown what all begin with.
	grown := func(size func(*tcpip.SocketOptions) int64) bool {
		for _, e := range s.carrier.Load().stack.RegisteredEndpoints() {
			if ep, ok := e.(*tcp.Endpoint); ok && size(ep.SocketOptions()) > tcprelay.Buffer {
				return true
			}
		}
		return false
	}
	t.Run("up", func(t *testing.T) {
		rate, looked := make(chan int64), make(chan struct{})
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
			rate <- bestRate(c, roundTrip, want)
			<-looked
		})
		c := b.mustDial(t, "tcp", to)
		go io.Copy(c, endless{})
		if got := <-rate; got < want {
			t.Errorf("%d bytes in a round trip, want %d", got, want)
		}
		if !grown((*tcpip.SocketOptions).GetReceiveBufferSize) {
			t.Error("the receive buffer has not grown")
		}
		close(looked)
		c.Close()
	})
	t.Run("down", func(t *testing.T) {
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) { io.Copy(struct{ io.Writer }{c}, endless{}) })
		if got := bestRate(b.mustDial(t, "tcp", to), roundTrip, want); got < want {
			t.Errorf("%d bytes in a round trip, want %d", got, want)
		}
		if !grown((*tcpip.SocketOptions).GetSendBufferSize) {
			t.Error("the send buffer has not grown")
		}
	})
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// bestRate is how many bytes come in a round trip, on average over the best of many times ten. It stops when that is
// enough.
func bestRate(c net.Conn, roundTrip time.Duration, enough int64) (best int64) {
	buf := make([]byte, 1<<20)
	for end := time.Now().Add(20 * time.Second); best < enough && time.Now().Before(end); {
		var n int64
		start := time.Now()
		for time.Since(start) < 10*roundTrip {
			m, err := c.Read(buf)
			if err != nil {
				return best
			}
			n += int64(m)
		}
		best = max(best, n*int64(roundTrip)/int64(time.Since(start)))
	}
	return best
}
