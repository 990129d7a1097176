package portmap

import (
	"errors"
	"fmt"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// The relay's bytes must never pass through its memory. The kernel counts what a process moves with read and write,
// but neither splice, nor the recv and send that the client and the server of this test use.
func TestTCPIsSpliced(t *testing.T) {
	m := newMapper(t)
	const size = 64 << 20
	port := serve(t, container, func(c *net.TCPConn) {
		drain(t, c)
		fill(t, c, size)
	})
	f := mustPublish(t, m, tcpPort(port), Host{})
	c := dial(t, at(f, "127.0.0.1"))
	readBefore, writtenBefore := ioCounters(t)
	fill(t, c, size)
	c.CloseWrite()
	if n := drain(t, c); n != size {
		t.Errorf("%d of %d bytes came back", n, size)
	}
	readAfter, writtenAfter := ioCounters(t)
	if r, w := readAfter-readBefore, writtenAfter-writtenBefore; r > size/64 || w > size/64 {
		t.Errorf("the relay read %d bytes and wrote %d of 2 × %d: it does not splice", r, w, size)
	}
}

// ioCounters are rchar and wchar of proc_pid_io(5).
func ioCounters(t testing.TB) (read, written int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(b), "rchar: %d\nwchar: %d\n", &read, &written); err != nil {
		t.Fatal(err)
	}
	return read, written
}

// fill sends size bytes with send(2).
func fill(t testing.TB, c *net.TCPConn, size int) {
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return
	}
	b := make([]byte, 256<<10)
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		for size > 0 {
			n, err := unix.SendmsgN(int(fd), b[:min(len(b), size)], nil, nil, unix.MSG_NOSIGNAL)
			if err == unix.EAGAIN {
				return false
			}
			if err != nil {
				sendErr = err
				return true
			}
			size -= n
		}
		return true
	})
	if err := errors.Join(err, sendErr); err != nil {
		t.Error(err)
	}
}

// drain receives until the end with recv(2).
func drain(t testing.TB, c *net.TCPConn) (size int) {
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return 0
	}
	b := make([]byte, 256<<10)
	var recvErr error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, err := unix.Recvfrom(int(fd), b, 0)
			if err == unix.EAGAIN {
				return false
			}
			if err != nil || n == 0 {
				recvErr = err
				return true
			}
			size += n
		}
	})
	if err := errors.Join(err, recvErr); err != nil {
		t.Error(err)
	}
	return size
}
