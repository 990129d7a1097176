package nonblock

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestConnect(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		at := l.Addr().(*net.TCPAddr).AddrPort()
		fd, err := connect(t, at)
		if err != nil {
			t.Fatalf("%s: %v", at, err)
		}
		if err := SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 77); err != nil {
			t.Error(err)
		}
		if got, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE); got != 77 || err != nil {
			t.Errorf("TCP_KEEPIDLE is %d, %v", got, err)
		}
		if err := SetsockoptInt(fd, unix.IPPROTO_TCP, 9999, 1); err != unix.ENOPROTOOPT {
			t.Errorf("an option that there is not: %v", err)
		}
		peer, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		if err := Shutdown(fd, unix.SHUT_WR); err != nil {
			t.Error(err)
		}
		if n, err := peer.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("after shutdown: %d, %v", n, err)
		}
		l.Close()
		if _, err := connect(t, at); err != unix.ECONNREFUSED {
			t.Errorf("nobody listens at %s: %v", at, err)
		}
	}
	if err := Shutdown(-1, unix.SHUT_WR); err != unix.EBADF {
		t.Error(err)
	}
}

// connect returns a socket and what became of it.
func connect(t *testing.T, to netip.AddrPort) (int, error) {
	t.Helper()
	fd, err := Socket(to.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := Connect(fd, to); err != nil && err != unix.EINPROGRESS {
		return fd, err
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		if decided, err := Connected(fd); decided {
			return fd, err
		}
	}
	t.Fatal("not decided within 10 s")
	return -1, nil
}
