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

func TestDatagrams(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // which blocks: the calls are not to
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(epoll)
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fds[1], &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		t.Fatal(err)
	}
	var bufs [5][10]byte
	var iovs [5]unix.Iovec
	var in, out [5]Message
	for i := range bufs {
		iovs[i] = Iovec(bufs[i][:])
		in[i].Hdr.Iov = &iovs[i]
		in[i].Hdr.SetIovlen(1)
	}
	ready := func() int {
		t.Helper()
		n, err := EpollReady(epoll, make([]unix.EpollEvent, 3))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n, err := Recvmmsg(fds[1], in[:]); n != 0 || err != unix.EAGAIN || ready() != 0 {
		t.Errorf("nothing: %d, %v, %d are ready", n, err, ready())
	}
	three, four := Iovec([]byte("three")), Iovec([]byte("four"))
	for i, v := range []*unix.Iovec{&three, &four} {
		out[i].Hdr.Iov = v
		out[i].Hdr.SetIovlen(1)
	}
	if err := Send(fds[0], []byte("one")); err != nil {
		t.Error(err)
	}
	if err := Send(fds[0], nil); err != nil {
		t.Error(err)
	}
	if err := Sendmsg(fds[0], &out[0].Hdr); err != nil {
		t.Error(err)
	}
	if n, err := Sendmmsg(fds[0], out[:2]); n != 2 || err != nil {
		t.Errorf("two messages: %d, %v", n, err)
	}
	if n := ready(); n != 1 {
		t.Errorf("%d are ready, want 1", n)
	}
	if n, err := Recvmmsg(fds[1], in[:]); n != 5 || err != nil {
		t.Fatalf("%d messages, %v, want 5", n, err)
	}
	for i, want := range []string{"one", "", "three", "three", "four"} {
		if got := string(bufs[i][:in[i].Len]); got != want {
			t.Errorf("message %d is %q, want %q", i, got, want)
		}
	}
	for range 1000 { // no more than the queue has room for
		err = Send(fds[0], []byte("x"))
	}
	if err != unix.EAGAIN {
		t.Errorf("more than there is room for: %v, want EAGAIN", err)
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
