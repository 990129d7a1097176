package agent

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/usermode/dhcp"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// eventually is how long anything may take on a busy machine.
const eventually = time.Minute

var (
	subnet    = netip.MustParsePrefix("192.168.127.0/24")
	gatewayIP = netip.MustParseAddr("192.168.127.1")
	guestIP   = netip.MustParseAddr("192.168.127.2")
	guestMAC  = l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
)

// noLeaks checks goroutines, links and descriptors when the test ends.
func noLeaks(t testing.TB) {
	t.Helper()
	nettest.NoLeaks(t)
	current := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, current) })
}

// host is a pretend gateway: a kernel in a namespace of its own, behind a TAP whose frames go to whoever connects.
type host struct {
	t      testing.TB
	ns     *netns.NS
	socket string
	tap    *tap
	old    bool // it knows gvproxy's framing only
	lease  time.Duration

	mu    sync.Mutex
	links []*l2.Link
	count int           // of connections
	up    chan struct{} // gets one for each connection
	stop  func()
}

// newHost makes a host that listens at no socket yet.
func newHost(t testing.TB) *host {
	h := &host{t: t, ns: nettest.NewNS(t), socket: filepath.Join(t.TempDir(), "gw.sock"), lease: time.Hour, up: make(chan struct{}, 100)}
	var back undo.List
	err := h.ns.Do(func() (err error) {
		h.tap, err = openTAP(Config{Interface: "gw0", Log: slog.New(slog.DiscardHandler)}, &back)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.tap.file.Close() })
	nettest.Handle(t, h.ns, func(k *netlink.Handle) error { return nettest.Addr(k, "gw0", netip.PrefixFrom(gatewayIP, 24)) })
	return h
}

// mtu sets the TAP's.
func (h *host) mtu(n int) {
	h.t.Helper()
	nettest.Handle(h.t, h.ns, func(k *netlink.Handle) error { return k.LinkSetMTU(h.tap.link, n) })
}

// serve listens until the test ends or stop is called, which also ends connections.
func (h *host) serve() {
	h.t.Helper()
	addr, err := vsock.Parse("unix://" + h.socket)
	if err != nil {
		h.t.Fatal(err)
	}
	l, err := vsock.Listen(addr)
	if err != nil {
		h.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/connect", h.connect)
	if !h.old {
		mux.HandleFunc("/connect"+l2.UsernetPath, h.connect)
	}
	s := &http.Server{Handler: mux}
	var g errgroup.Group
	g.Go(func() error { s.Serve(l); return nil })
	h.stop = sync.OnceFunc(func() {
		s.Close()
		h.cut()
		g.Wait()
	})
	h.t.Cleanup(h.stop)
}

// cut ends the connections.
func (h *host) cut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.links {
		l.Interrupt()
	}
	h.links = nil
}

func (h *host) connect(w http.ResponseWriter, r *http.Request) {
	conn, opts, err := l2.Connect(w, r, h.tap.takes)
	if err != nil {
		h.t.Error(err)
		return
	}
	link := l2.Stream(conn, opts)
	defer link.Close()
	if err := h.tap.begin(opts.Takes); err != nil {
		h.t.Error(err)
		return
	}
	h.mu.Lock()
	h.links = append(h.links, link)
	h.count++
	h.mu.Unlock()
	h.up <- struct{}{}
	var g errgroup.Group
	g.Go(func() error {
		defer link.Interrupt()
		return newSender(h.tap, link, new(atomic.Uint64)).run()
	})
	g.Go(func() error {
		defer h.tap.interrupt()
		return newWriter(h.tap, link, new(atomic.Uint64)).run()
	})
	g.Wait()
}

// dhcp serves addresses.
func (h *host) dhcp() *dhcp.Server {
	h.t.Helper()
	s, err := dhcp.New(dhcp.Config{
		Subnet: subnet, Gateway: gatewayIP, MTU: 1500, Lease: h.lease, Search: []string{"example.com"},
		Static: map[netip.Addr]dhcp.MAC{guestIP: guestMAC}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		h.t.Fatal(err)
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if ctl := c.Control(func(fd uintptr) {
			if err = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "gw0"); err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
			}
		}); ctl != nil {
			return ctl
		}
		return err
	}}
	var conn net.PacketConn
	if err := h.ns.Do(func() (err error) {
		conn, err = lc.ListenPacket(context.Background(), "udp4", ":67")
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return s.Serve(ctx, conn) })
	h.t.Cleanup(func() {
		cancel()
		if err := g.Wait(); err != nil {
			h.t.Error(err)
		}
		conn.Close()
	})
	return s
}

// connection is one of the machine's to the host, both ends of it.
func (h *host) connection() (guest, peer net.Conn) {
	h.t.Helper()
	l := listenTCP(h.t, h.ns, gatewayIP.String()+":0")
	guest, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { guest.Close() })
	if peer, err = l.Accept(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { peer.Close() })
	return guest, peer
}

// config is an agent's for this host.
func (h *host) config() Config {
	addr, err := vsock.Parse("unix://" + h.socket)
	if err != nil {
		h.t.Fatal(err)
	}
	return Config{Gateway: addr, Path: "/connect", Interface: "tap0", MAC: guestMAC, Log: slog.New(slog.NewTextHandler(h.t.Output(), nil))}
}

// running is an agent that runs.
type running struct {
	t      testing.TB
	cancel context.CancelFunc
	ready  chan struct{}
	ended  chan error
}

// run runs an agent until the test ends.
func run(t testing.TB, cfg Config) *running {
	t.Helper()
	r := &running{t: t, ready: make(chan struct{}), ended: make(chan error, 1)}
	cfg.Ready = func() { close(r.ready) }
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(context.Background())
	go func() { r.ended <- a.Run(ctx) }()
	t.Cleanup(r.stop)
	return r
}

// stop ends the agent, which must do so without an error.
func (r *running) stop() {
	r.cancel()
	select {
	case err, ok := <-r.ended:
		if ok && err != nil {
			r.t.Errorf("Run: %v", err)
		}
		if ok {
			close(r.ended)
		}
	case <-time.After(eventually):
		r.t.Error("Run does not end")
	}
}

// await waits until the agent is ready.
func (r *running) await() {
	r.t.Helper()
	select {
	case <-r.ready:
	case err := <-r.ended:
		r.ended <- nil
		r.t.Fatalf("Run: %v", err)
	case <-time.After(eventually):
		r.t.Fatal("the agent is not ready")
	}
}

// listenTCP listens in a namespace.
func listenTCP(t testing.TB, ns *netns.NS, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	if err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}
