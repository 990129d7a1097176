package splice

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// datagrams is a pair of sockets, the first of which is not blocking.
func datagrams(t *testing.T) (fd, peer int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(pair[0]); unix.Close(pair[1]) })
	return pair[0], pair[1]
}

// watching is a Watcher that has begun, and a function that has its thread call something and waits for it.
func watching(t *testing.T, g *Group, end func(*Watcher)) (do func(func(*Watcher))) {
	t.Helper()
	begun := make(chan *Watcher, 1)
	var w *Watcher
	g.Watch(func(w *Watcher) { begun <- w }, func() { end(w) })
	w = <-begun
	t.Cleanup(g.Close)
	return func(f func(*Watcher)) {
		done := make(chan struct{})
		w.worker.post(func() { f(w); close(done) })
		<-done
	}
}

func TestWatch(t *testing.T) {
	var g Group
	a, peerA := datagrams(t)
	b, peerB := datagrams(t)
	read := make(chan string, 10)
	watch := func(w *Watcher, fd int) *Watch {
		x, err := w.Add(fd, func() {
			buf := make([]byte, 10)
			if n, err := unix.Read(fd, buf); err == nil {
				read <- string(buf[:n])
			}
		})
		if err != nil {
			t.Error(err)
		}
		return x
	}
	var watchA, watchB *Watch
	do := watching(t, &g, func(w *Watcher) { w.Remove(watchB) })
	do(func(w *Watcher) { watchA, watchB = watch(w, a), watch(w, b) })
	unix.Write(peerA, []byte("a"))
	if got := <-read; got != "a" {
		t.Errorf("read %q, want a", got)
	}
	do(func(w *Watcher) { w.Remove(watchA) })
	unix.Write(peerA, []byte("removed"))
	unix.Write(peerB, []byte("b"))
	if got := <-read; got != "b" {
		t.Errorf("read %q, want b", got)
	}
	g.Close()
	unix.Write(peerB, []byte("closed"))
	do(func(*Watcher) {}) // the thread looks for events before it does that
	if n := len(read); n != 0 {
		t.Errorf("%d more were read", n)
	}
}

// A descriptor that is not read is announced again.
func TestWatchInsists(t *testing.T) {
	var g Group
	fd, peer := datagrams(t)
	var x *Watch
	do := watching(t, &g, func(w *Watcher) { w.Remove(x) })
	calls := make(chan struct{})
	n := 0
	do(func(w *Watcher) {
		x, _ = w.Add(fd, func() {
			if n++; n == 3 {
				unix.Read(fd, make([]byte, 10))
				close(calls)
			}
		})
	})
	unix.Write(peer, []byte("hello"))
	<-calls
}

func TestWatcherAlarm(t *testing.T) {
	var g Group
	rang := make(chan string, 10)
	do := watching(t, &g, func(*Watcher) {})
	do(func(w *Watcher) {
		w.Alarm(time.Millisecond, func() { rang <- "forgotten" })
		w.Alarm(10*time.Millisecond, func() {
			rang <- "once"
			w.Alarm(time.Millisecond, func() { rang <- "again" })
		})
	})
	for _, want := range []string{"once", "again"} {
		if got := <-rang; got != want {
			t.Errorf("%q rang, want %q", got, want)
		}
	}
	// One that is set when the group is closed does not ring, and keeps no thread: see TestMain.
	do(func(w *Watcher) { w.Alarm(time.Hour, func() { rang <- "late" }) })
}

func TestWatchAfterClose(t *testing.T) {
	var g Group
	g.Close()
	var called atomic.Bool
	g.Watch(func(*Watcher) { called.Store(true) }, func() { called.Store(true) })
	g.Close()
	if called.Load() {
		t.Error("a watcher of a closed group was called")
	}
}

// Close waits for the end, which comes once, and after the beginning.
func TestCloseEndsWatchers(t *testing.T) {
	for range 100 {
		var g Group
		var begun, ended int
		g.Watch(func(*Watcher) { begun++ }, func() { ended += begun })
		g.Close()
		g.Close()
		if begun != 1 || ended != 1 {
			t.Fatalf("begun %d times, ended %d times", begun, ended)
		}
	}
}
