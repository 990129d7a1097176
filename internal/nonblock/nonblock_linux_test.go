package nonblock

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

func pair(t *testing.T) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	return fds[0], fds[1]
}

func TestReadAndWrite(t *testing.T) {
	a, b := pair(t)
	if n, err := Read(b, make([]byte, 1)); n != 0 || err != unix.EAGAIN {
		t.Errorf("read of nothing: %d, %v", n, err)
	}
	if n, err := Write(a, []byte("some")); n != 4 || err != nil {
		t.Errorf("write: %d, %v", n, err)
	}
	var head, tail [3]byte
	if n, err := Readv(b, []unix.Iovec{Iovec(head[:]), Iovec(tail[:])}); n != 4 || err != nil || string(head[:]) != "som" || tail[0] != 'e' {
		t.Errorf("readv: %d, %v, %q %q", n, err, head, tail)
	}
	if n, err := Write(-1, []byte("x")); n != 0 || err != unix.EBADF {
		t.Errorf("write to nobody: %d, %v", n, err)
	}
	unix.Shutdown(a, unix.SHUT_WR)
	if n, err := Read(b, head[:]); n != 0 || err != nil {
		t.Errorf("read at the end: %d, %v", n, err)
	}
}

// TestSkip has a vector go through a socket that takes a part of it at a time.
func TestSkip(t *testing.T) {
	a, b := pair(t)
	var want []byte
	var iovs []unix.Iovec
	for i := range 100 {
		part := bytes.Repeat([]byte{byte(i)}, 1+i*i*10)
		want = append(want, part...)
		iovs = append(iovs, Iovec(part))
	}
	var got []byte
	parts := 0
	for buf := make([]byte, 7777); len(got) < len(want); {
		if len(iovs) > 0 {
			n, err := Writev(a, iovs)
			if err != nil && err != unix.EAGAIN {
				t.Fatal(err)
			}
			iovs = Skip(iovs, n)
			parts++
		}
		n, err := Read(b, buf)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:n]...)
	}
	if len(iovs) > 0 || !bytes.Equal(got, want) {
		t.Errorf("%d of %d bytes arrived, %d parts are left", len(got), len(want), len(iovs))
	}
	if parts < 3 {
		t.Errorf("it was written by %d calls: nothing was cut", parts)
	}
}
