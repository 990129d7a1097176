package usermode

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/tcprelay"
)

var otherGuest4 = netip.MustParsePrefix("10.200.8.3/24")

// addGuest gives the bed's container a second address: to netstack, another container.
func (b *bed) addGuest(t testing.TB) {
	t.Helper()
	nettest.Handle(t, b.container, func(h *netlink.Handle) error { return nettest.Addr(h, "tun0", otherGuest4) })
}

// dialAs connects from one of the container's addresses.
func (b *bed) dialAs(as netip.Prefix, to netip.AddrPort) (c net.Conn, err error) {
	err = b.container.Do(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(as.Addr(), 0))}
		c, err = d.Dial("tcp", to.String())
		return err
	})
	if err == nil {
		c.SetDeadline(time.Now().Add(time.Minute))
	}
	return c, err
}

// blackHole is an address of the host that does not answer SYNs: a listener whose queue is full.
func blackHole(t testing.TB) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: host4.Addr().As4()}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(host4.Addr(), uint16(sa.(*unix.SockaddrInet4).Port))
	c, err := net.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return to
}

// A container that knocks at thousands of dead addresses delays nobody else, and the counters show it.
func TestGreedyDialer(t *testing.T) {
	const greed = 3 * tcprelay.MaxClientHandshakes
	var c *carrier
	b := runCarrier(t, testNetstackConfig(t, usual), func(made *carrier) { c = made })
	b.addGuest(t)
	hole, to := blackHole(t), listenTCP(t, host4.Addr(), echoTCP)
	for range greed {
		f, err := connectFrom(b.container, hole)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
	}
	eventually(t, "the limit is reached", func() bool {
		st := c.stats()
		return st.Pending >= tcprelay.MaxClientHandshakes && st.Ignored > 0
	})
	const others = 50
	repeated := 0
	for range others {
		conn, err := b.dialAs(otherGuest4, to)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, conn)
		repeated += min(retransmits(t, conn), 1)
		conn.Close()
	}
	// Without the limit the others' SYNs would be dropped, and repeated after a second. A busy machine loses one that way, too.
	if repeated > others/10 {
		t.Errorf("%d of the other container's %d connections had to repeat packets", repeated, others)
	}
	if st := c.stats(); st.Pending > tcprelay.MaxClientHandshakes+1 || st.Refused != 0 {
		t.Errorf("%+v, want no more than %d pending", st, tcprelay.MaxClientHandshakes)
	}
	c.relays.Close() // or the dials would have to time out
}

// retransmits is the number of packets that the kernel has sent more than once, the SYN included.
func retransmits(t testing.TB, c net.Conn) int {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return int(info.Total_retrans)
}

func exchange(t testing.TB, c net.Conn) {
	t.Helper()
	b := []byte("x")
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
}

// One container's bulk transfers leave room for another's requests.
func TestBulkBesideRequests(t *testing.T) {
	var stack *stack.Stack
	b := runCarrier(t, testNetstackConfig(t, usual), func(c *carrier) { stack = c.stack })
	b.addGuest(t)
	sink, echo := listenTCP(t, host4.Addr(), drain), listenTCP(t, host4.Addr(), echoTCP)
	conn, err := b.dialAs(otherGuest4, echo)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var bulk []net.Conn
	for range 8 {
		bulk = append(bulk, b.mustDial(t, "tcp", sink))
	}
	for _, c := range bulk {
		go io.Copy(c, endless{}) // until it is closed
	}
	var took []time.Duration
	for range 300 {
		start := time.Now()
		exchange(t, conn)
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	t.Logf("round trip beside bulk: median %v, worst %v", took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > 200*time.Millisecond {
		t.Errorf("a round trip takes %v", took[len(took)/2])
	}
	// All of a window is a queue before the TUN: when they grew with what was sent, it took ten times as long.
	for _, e := range stack.RegisteredEndpoints() {
		ep, ok := e.(*tcp.Endpoint)
		if !ok {
			continue
		}
		var info tcpip.TCPInfoOption
		if err := ep.GetSockOpt(&info); err != nil {
			t.Fatal(err)
		}
		if size := ep.SocketOptions().GetReceiveBufferSize(); size != tcprelay.Buffer && info.RTT < 20*time.Millisecond {
			t.Errorf("a receive buffer has grown to %d bytes, for a round trip of %v", size, info.RTT)
		}
	}
}

// Connections beyond a container's share are reset; another container still gets its own.
func TestTooManyConnections(t *testing.T) {
	var c *carrier
	cfg := testNetstackConfig(t, usual)
	cfg.TCP.ClientConns = 3
	b := runCarrier(t, cfg, func(made *carrier) { c = made })
	b.addGuest(t)
	to := listenTCP(t, host4.Addr(), echoTCP)
	for range 3 {
		exchange(t, b.mustDial(t, "tcp", to))
	}
	if conn, err := b.dial("tcp", to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a fourth connection: %v, want ECONNREFUSED", err)
		if err == nil {
			conn.Close()
		}
	}
	conn, err := b.dialAs(otherGuest4, to)
	if err != nil {
		t.Fatalf("the other container: %v", err)
	}
	defer conn.Close()
	exchange(t, conn)
	if st := c.stats(); st.Conns != 4 || st.Refused != 1 || st.Pending != 0 {
		t.Errorf("%+v, want 4 connections and one refused", st)
	}
}

// A destination that does not answer is one that refuses, when the dial's time is up.
func TestDialTimeout(t *testing.T) {
	cfg := testNetstackConfig(t, usual)
	cfg.TCP.Dial = 300 * time.Millisecond
	b := runCarrier(t, cfg, func(*carrier) {})
	start := time.Now()
	_, err := b.dial("tcp", blackHole(t))
	if took := time.Since(start); !errors.Is(err, syscall.ECONNREFUSED) || took < 300*time.Millisecond {
		t.Errorf("%v after %v, want ECONNREFUSED after 300 ms", err, took)
	}
}

// A reader that does not read holds the sender up, at either end, and netstack holds no more than its buffers.
func TestSlowReader(t *testing.T) {
	const limit = 64 << 20 // what all buffers on the way may hold, the kernels' included
	stuck := func(t *testing.T, c net.Conn) {
		t.Helper()
		c.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := c.Write(make([]byte, limit))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("wrote %d bytes, %v, want a timeout", n, err)
		}
	}
	b := newBed(t, usual)
	t.Run("host", func(t *testing.T) {
		release := make(chan struct{})
		to := listenTCP(t, host4.Addr(), func(*net.TCPConn) { <-release })
		stuck(t, b.mustDial(t, "tcp", to))
		close(release)
	})
	t.Run("container", func(t *testing.T) {
		done := make(chan struct{})
		to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) { defer close(done); stuck(t, c) })
		b.mustDial(t, "tcp", to)
		<-done
	})
}

// Data and FIN in one segment, and a FIN right behind the SYN's answer.
func TestTCPDataWithFIN(t *testing.T) {
	b := newBed(t, usual)
	got := make(chan string, 1)
	to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) {
		all, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		got <- string(all)
	})
	for _, text := range []string{"last words", ""} {
		c := b.mustDial(t, "tcp", to).(*net.TCPConn)
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_CORK, 1) }); err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, text) // held back by the cork until the FIN
		c.CloseWrite()
		if g := <-got; g != text {
			t.Errorf("host got %q, want %q", g, text)
		}
		if n, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read %d bytes, %v, want the end", n, err)
		}
	}
}
