package usermode

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// pollFunc is a socket that does something when it is ready.
type pollFunc func()

func (f pollFunc) ready() { f() }

// Of two sockets that are ready at once, one may end the other, and a new one may get its place: the event that is
// still to come is not the new one's.
func TestPollerForgetsTheDead(t *testing.T) {
	p, err := newPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	var pairs [3][2]int
	for i := range pairs {
		pairs[i], err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pairs[i][0])
		defer unix.Close(pairs[i][1])
	}
	var places [2]int32
	calls := 0
	for i := range places {
		places[i], err = p.add(pairs[i][0], pollFunc(func() {
			calls++
			other := 1 - i
			if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, pairs[other][0], nil); err != nil { // as closing does
				t.Error(err)
			}
			p.remove(places[other])
			place, err := p.add(pairs[2][0], pollFunc(func() { t.Error("the new socket gets the old one's event") }))
			if err != nil || place != places[other] {
				t.Errorf("place %d, %v; want the one that became free, %d", place, err, places[other])
			}
		}))
		if err != nil {
			t.Fatal(err)
		}
		unix.Write(pairs[i][1], []byte("x"))
	}
	p.glance()
	if calls != 1 {
		t.Errorf("%d sockets were served, want one", calls)
	}
}

func TestPollerStops(t *testing.T) {
	p, err := newPoller()
	if err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	done := make(chan error)
	go func() { done <- p.wait(pair[0]) }()
	unix.Write(pair[1], []byte("x"))
	if err := <-done; err != nil {
		t.Errorf("wait for a packet: %v", err)
	}
	unix.Read(pair[0], make([]byte, 1))
	go func() { done <- p.wait(pair[0]) }()
	p.stop()
	if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("wait after stop: %v", err)
	}
	p.close()
	p.stop() // whoever stops late does no harm
}
