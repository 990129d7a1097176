package usermode

import (
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/nonblock"
)

// runCarrier runs a carrier on a TUN in a namespace of its own, after set has changed it.
func runCarrier(t testing.TB, cfg netstackConfig, set func(*carrier)) *bed {
	t.Helper()
	nettest.NoLeaks(t)
	routines := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, routines) })
	nettest.Host(t, host4, host6)
	b := &bed{container: nettest.NewNS(t)}
	b.tun = addTestTUN(t, b.container, variant{cfg.MTU, cfg.Offload})
	raw, err := b.tun.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	c, err := newCarrier(raw, cfg)
	if err != nil {
		t.Fatal(err)
	}
	set(c)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.link.receive(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		b.tun.SetReadDeadline(time.Unix(1, 0))
		wg.Wait()
		c.close()
	})
	return b
}

// Linux 6.6 before 89add40066f9 took TUNSETOFFLOAD and then refused super-segments: everything stood still.
func TestKernelRefusesSegmentation(t *testing.T) {
	var logged countingWriter
	var refuses atomic.Bool
	cfg := testNetstackConfig(t, usual)
	cfg.Log = slog.New(slog.NewTextHandler(&logged, nil))
	var l *link
	b := runCarrier(t, cfg, func(c *carrier) {
		l = c.link
		l.writev = func(fd int, iovs []unix.Iovec) (int, error) {
			if hdr, err := decodeVirtio(unsafe.Slice(iovs[0].Base, iovs[0].Len)); err == nil && hdr.gsoType != 0 && refuses.Load() {
				return 0, unix.EINVAL
			}
			return nonblock.Writev(fd, iovs)
		}
	})
	const size = 8 << 20
	want, _ := sum(t, noise(2, size))
	to := listenTCP(t, host6.Addr(), func(c *net.TCPConn) {
		for one := make([]byte, 1); ; {
			if _, err := io.ReadFull(c, one); err != nil {
				return
			}
			io.Copy(c, noise(2, size))
		}
	})
	transfer := func(c net.Conn) {
		t.Helper()
		c.Write([]byte("x"))
		if got, n := sum(t, io.LimitReader(c, size)); got != want {
			t.Errorf("%d bytes of %d, or wrong ones", n, size)
		}
	}
	old := b.mustDial(t, "tcp", to)
	transfer(old)
	if l.SupportedGSO() != stack.HostGSOSupported || l.cut.Load() != 0 {
		t.Fatalf("before the kernel refuses anything: %v, %d packets cut", l.SupportedGSO(), l.cut.Load())
	}
	refuses.Store(true)
	transfer(old)
	if l.SupportedGSO() != stack.GVisorGSOSupported || l.cut.Load() == 0 || l.lost.Load() != 0 {
		t.Errorf("after: %v, %d packets cut, %d lost", l.SupportedGSO(), l.cut.Load(), l.lost.Load())
	}
	cut := l.cut.Load()
	transfer(b.mustDial(t, "tcp", to))
	// Eight megabytes are more than a hundred super-segments; the old connection may have one to repeat.
	if l.cut.Load() > cut+20 {
		t.Errorf("a new connection still sends what must be cut, %d times", l.cut.Load()-cut)
	}
	if n := logged.Load(); n != 1 {
		t.Errorf("%d lines in the log, want 1", n)
	}
}

// countingWriter counts what is written, such as a log's lines.
type countingWriter struct{ atomic.Int32 }

func (w *countingWriter) Write(p []byte) (int, error) {
	w.Add(1)
	return len(p), nil
}
