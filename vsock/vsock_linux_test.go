package vsock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// loopback tells whether the kernel has vsock_loopback, without which no connection can be made: CID 1 would lead
// to the hypervisor of the machine that runs the test. Being no module everywhere, it shows by its CID.
func loopback(t testing.TB) bool {
	t.Helper()
	l, err := Listen(mustParse(t, "vsock://local:0"))
	if err == nil {
		l.Close()
		return true
	}
	if !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Fatal(err)
	}
	if _, err := os.Stat("/sys/module/vsock_loopback"); err == nil {
		t.Fatal("there is vsock_loopback, and nobody can listen on it")
	}
	fmt.Fprintf(os.Stderr, "NOT TESTED by %s: connections over AF_VSOCK, because this kernel has no vsock_loopback\n", t.Name())
	return false
}

func TestVsock(t *testing.T) {
	noLeaks(t)
	if !loopback(t) {
		return // the rest of the package is tested without
	}
	l := listen(t, "vsock://local:0")
	echo(t, l)
	url := fmt.Sprintf("vsock://local:%d", l.Addr().(*vsock.Addr).Port)
	conn := dial(t, url)
	if cid, ok := PeerCID(conn); !ok || cid != cidLocal {
		t.Errorf("peer CID %d, %v, want %d", cid, ok, cidLocal)
	}
	talk(t, conn)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Dial(soon(t), mustParse(t, url)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial without a listener: %v", err)
	}
}

// TestVsockSplice moves what one connection says to another one by splice(2) alone.
func TestVsockSplice(t *testing.T) {
	noLeaks(t)
	if !loopback(t) {
		return
	}
	l := listen(t, "vsock://local:0")
	url := fmt.Sprintf("vsock://local:%d", l.Addr().(*vsock.Addr).Port)
	pair := func() (ours, theirs *vsock.Conn) {
		ours = dial(t, url).(*vsock.Conn)
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		return ours, conn.(*vsock.Conn)
	}
	say, from := pair()
	to, hear := pair()
	for _, conn := range []*vsock.Conn{say, from} {
		if got := bufferSize(t, conn); got != window {
			t.Errorf("%v lets %v have %d bytes under way, want %d", conn.LocalAddr(), conn.RemoteAddr(), got, window)
		}
	}
	if _, err := io.WriteString(say, "hello"); err != nil {
		t.Fatal(err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	move := func(conn *vsock.Conn, wait func(syscall.RawConn, func(uintptr) bool) error, splice func(fd int) error) {
		t.Helper()
		rc, err := conn.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var moved error
		err = wait(rc, func(fd uintptr) bool {
			moved = splice(int(fd))
			return moved != unix.EAGAIN
		})
		if err := errors.Join(err, moved); err != nil {
			t.Fatal(err)
		}
	}
	move(from, syscall.RawConn.Read, func(fd int) error {
		_, err := unix.Splice(fd, nil, pipe[1], nil, 1<<16, unix.SPLICE_F_NONBLOCK)
		return err
	})
	move(to, syscall.RawConn.Write, func(fd int) error {
		_, err := unix.Splice(pipe[0], nil, fd, nil, 1<<16, unix.SPLICE_F_NONBLOCK)
		return err
	})
	got := make([]byte, 5)
	if _, err := io.ReadFull(hear, got); err != nil || string(got) != "hello" {
		t.Errorf("got %q, %v, want hello", got, err)
	}
}

func bufferSize(t *testing.T, conn *vsock.Conn) (size uint64) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		size, failed = unix.GetsockoptUint64(int(fd), unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_SIZE)
	})
	if err := errors.Join(err, failed); err != nil {
		t.Fatal(err)
	}
	return size
}

// TestVsockListen needs no transport: a listener for every CID, its port, and its end.
func TestVsockListen(t *testing.T) {
	noLeaks(t)
	l := listen(t, "vsock://:0")
	addr, ok := l.Addr().(*vsock.Addr)
	if !ok || addr.ContextID != cidAny || addr.Port == 0 || addr.Port == portAny {
		t.Fatalf("address %v", l.Addr())
	}
	if _, err := Listen(mustParse(t, fmt.Sprintf("vsock://:%d", addr.Port))); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		done <- err
	}()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

func TestVsockErrors(t *testing.T) {
	for _, url := range []string{"vsock://:1024", "vsock://3:0"} {
		if _, err := Dial(soon(t), mustParse(t, url)); err == nil || !strings.Contains(err.Error(), "a CID and a port") {
			t.Errorf("dial %s: %v", url, err)
		}
	}
	_, err := Listen(mustParse(t, "vsock://77777:1024"))
	if want := "listen on vsock://77777:1024: "; err == nil || !strings.HasPrefix(err.Error(), want) || strings.Count(err.Error(), "77777") > 1 {
		t.Errorf("listen on another's CID: %v, want %s and why", err, want)
	}
}
