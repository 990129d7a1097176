package tcprelay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func dialer(t *testing.T, timeout time.Duration) (_ *Relays, cancel context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	return &Relays{ctx: ctx, cfg: Config{Limits: Limits{Dial: timeout}.orUsual()}}, cancel
}

// full listens on a port that answers no SYN, until it is closed: its backlog is full.
func full(t *testing.T) (at netip.AddrPort, fd int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*unix.SockaddrInet4).Port))
	r, cancel := dialer(t, 100*time.Millisecond)
	defer cancel()
	for range 10 {
		c, err := r.dial(at)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return at, fd
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("a backlog of 0 is not full")
	return
}

func TestDialSocket(t *testing.T) {
	r, cancel := dialer(t, 0)
	defer cancel()
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		to := l.Addr().(*net.TCPAddr).AddrPort()
		host, err := r.dial(to)
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		peer, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		if _, err := host.Write([]byte("there")); err != nil {
			t.Fatal(err)
		}
		if err := host.(*socket).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(peer); string(got) != "there" || err != nil {
			t.Errorf("%s: %q, %v", at, got, err)
		}
		if _, err := peer.Write([]byte("back")); err != nil { // the other half is open
			t.Fatal(err)
		}
		got := make([]byte, 4)
		if _, err := io.ReadFull(host, got); !bytes.Equal(got, []byte("back")) || err != nil {
			t.Errorf("%s: %q, %v", at, got, err)
		}
		peer.Close()
		l.Close()
		if _, err := r.dial(to); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: nobody listens: %v", at, err)
		}
	}
}

// dialled is a connection, both ends of it.
func dialled(t *testing.T) (host conn, peer net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, cancel := dialer(t, 0)
	defer cancel()
	if host, err = r.dial(l.Addr().(*net.TCPAddr).AddrPort()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	if peer, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	return host, peer
}

func TestResetOfHost(t *testing.T) {
	host, peer := dialled(t)
	reset(host)
	if _, err := peer.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Error(err)
	}
}

func TestDialOptions(t *testing.T) {
	host, _ := dialled(t)
	host.(*socket).raw.Control(func(fd uintptr) {
		for _, o := range []struct{ level, name, want int }{
			{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15}, {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
		} {
			if got, err := unix.GetsockoptInt(int(fd), o.level, o.name); got != o.want || err != nil {
				t.Errorf("option %d of %d is %d, %v, want %d", o.name, o.level, got, err, o.want)
			}
		}
	})
}

// A connection that takes its time is awaited: until it stands, the time is up, or the relays end.
func TestDialWaits(t *testing.T) {
	at, fd := full(t)
	t.Run("cancelled", func(t *testing.T) {
		r, cancel := dialer(t, time.Hour)
		time.AfterFunc(20*time.Millisecond, cancel)
		if _, err := r.dial(at); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Run("stands", func(t *testing.T) {
		r, cancel := dialer(t, 30*time.Second)
		defer cancel()
		accepted := make(chan struct{})
		go func() {
			defer close(accepted)
			for {
				c, _, err := unix.Accept(fd)
				if err != nil {
					return
				}
				unix.Close(c)
			}
		}()
		host, err := r.dial(at) // at the latest by the SYN's repetition
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		if _, err := host.Read(make([]byte, 1)); err != io.EOF { // and no deadline is left
			t.Error(err)
		}
		unix.Shutdown(fd, unix.SHUT_RDWR)
		<-accepted
	})
}
