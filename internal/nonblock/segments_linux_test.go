package nonblock

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSegments(t *testing.T) {
	if !CutsDatagrams() {
		t.Fatal("the kernel is older than 4.18, or does not say that it is not")
	}
	server, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	client, err := net.DialUDP("udp4", nil, server.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	raw, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var s Segments
	for range 2 { // they may be used again
		raw.Control(func(fd uintptr) {
			err = s.Send(int(fd), []unix.Iovec{Iovec([]byte("onetwo")), Iovec([]byte("3"))}, 3)
		})
		if err != nil {
			t.Fatal(err)
		}
		server.SetReadDeadline(time.Now().Add(10 * time.Second))
		for _, want := range []string{"one", "two", "3"} {
			b := make([]byte, 10)
			if n, err := server.Read(b); err != nil || string(b[:n]) != want {
				t.Errorf("%q, %v, want %q", b[:n], err, want)
			}
		}
	}
	raw.Control(func(fd uintptr) { err = s.Send(int(fd), []unix.Iovec{Iovec(make([]byte, 2*MaxSegments+200))}, 1) })
	if err != unix.EINVAL {
		t.Errorf("more than one call takes: %v, want EINVAL", err)
	}
}
