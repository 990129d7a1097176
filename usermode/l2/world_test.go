//go:build unix

package l2

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// socketpair is a pair of connected unix sockets of a type.
func socketpair(t testing.TB, typ int) (host, guest *net.UnixConn) {
	t.Helper()
	host, guest, err := newSocketpair(typ)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		host.Close()
		guest.Close()
	})
	return host, guest
}

func newSocketpair(typ int) (host, guest *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, typ, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	return conns[0].(*net.UnixConn), conns[1].(*net.UnixConn), nil
}

// bed is a switch with guests, which end with the test.
type bed struct {
	t   testing.TB
	sw  *Switch
	ctx context.Context
	wg  sync.WaitGroup
}

func newBed(t testing.TB, cfg Config) *bed {
	cfg.GatewayMAC = gatewayMAC
	ctx, cancel := context.WithCancel(t.Context())
	b := &bed{t: t, sw: NewSwitch(cfg), ctx: ctx}
	t.Cleanup(func() {
		cancel()
		b.wg.Wait()
	})
	return b
}

// run runs a port for l and waits until it is one of the switch's.
func (b *bed) run(l *Link, cfg PortConfig) (*Port, <-chan error) {
	b.t.Helper()
	p := b.sw.NewPort(l, cfg)
	ended := make(chan error, 1)
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		ended <- p.Run(b.ctx)
	}()
	b.until(func() bool {
		for _, o := range b.sw.Ports() {
			if o == p {
				return true
			}
		}
		return len(ended) > 0
	})
	return p, ended
}

// until waits for something that nothing tells of.
func (b *bed) until(done func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatal("it does not come about")
		}
	}
}

// guest is a machine on a port, seen from its own side.
type guest struct {
	*Link
	t       testing.TB
	conn    net.Conn
	port    *Port
	ended   <-chan error
	mac     MAC
	waiting []Frame
}

// stream adds a guest on a stream.
func (b *bed) stream(i int, opts Options, cfg PortConfig) *guest {
	b.t.Helper()
	host, mine := socketpair(b.t, unix.SOCK_STREAM)
	p, ended := b.run(Stream(host, opts), cfg)
	return &guest{Link: Stream(mine, opts), t: b.t, conn: mine, port: p, ended: ended, mac: guestMAC(i)}
}

// say sends a frame of 60 bytes.
func (g *guest) say(dst MAC, number uint32) {
	g.t.Helper()
	g.send(Frame{Head: frame(dst, g.mac, 60, number)})
}

func (g *guest) send(frames ...Frame) {
	g.t.Helper()
	if _, err := g.Send(frames); err != nil {
		g.t.Fatal(err)
	}
}

// next is the next frame that comes.
func (g *guest) next() Frame {
	g.t.Helper()
	if len(g.waiting) == 0 {
		g.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		frames, err := g.Receive()
		if err != nil {
			g.t.Fatalf("%s: %v", g.mac, err)
		}
		g.waiting = frames
	}
	f := g.waiting[0]
	g.waiting = g.waiting[1:]
	return f
}

// hears wants the next frame to have number.
func (g *guest) hears(number uint32) {
	g.t.Helper()
	if got := numberOf(g.next()); got != number {
		g.t.Errorf("%s hears frame %d, want %d", g.mac, got, number)
	}
}

func numberOf(f Frame) uint32 {
	if len(f.Head) < headerLen+4 {
		return 0
	}
	return binary.BigEndian.Uint32(f.Head[14:])
}

// gateway notes what it gets.
type gateway struct {
	mu   sync.Mutex
	got  []uint32 // numbers
	last []byte
	from *Port
	n    int
	data uint64
}

func (g *gateway) Deliver(from *Port, frames []Frame) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.from = from
	for i := range frames {
		g.n++
		g.data += uint64(frames[i].Len())
		g.last = frames[i].appendTo(g.last[:0])
		if len(g.got) < 1024 {
			g.got = append(g.got, numberOf(frames[i]))
		}
	}
}

func (g *gateway) numbers() []uint32 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]uint32(nil), g.got...)
}
