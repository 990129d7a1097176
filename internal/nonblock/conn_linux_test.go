package nonblock

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// taken is a Conn and the connection at its other end.
func taken(t *testing.T) (*Conn, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
	}
	c, err := Take(ends[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); ends[1].Close() })
	return c, ends[1]
}

// Both directions at once, with pieces of all lengths, and more of them than the socket holds.
func TestConnCarries(t *testing.T) {
	c, peer := taken(t)
	data := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	send := func(w io.Writer, done func() error) error {
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 1+rand.IntN(300<<10))
			if _, err := w.Write(rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return done()
	}
	receive := func(r io.Reader) error {
		got, err := io.ReadAll(r)
		if err == nil && !bytes.Equal(got, data) {
			err = fmt.Errorf("%d bytes, not those that were sent", len(got))
		}
		return err
	}
	results := make(chan error)
	hangUp := func() (err error) {
		return errors.Join(c.raw.Control(func(fd uintptr) { err = Shutdown(int(fd), unix.SHUT_WR) }), err)
	}
	go func() { results <- send(c, hangUp) }()
	go func() { results <- send(peer, peer.CloseWrite) }()
	go func() { results <- receive(c) }()
	go func() { results <- receive(peer) }()
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// asked is what an epoll waits for, besides errors and the end: epoll(7), proc_pid_fdinfo(5).
func asked(t *testing.T, f *os.File) uint32 {
	t.Helper()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var text []byte
	raw.Control(func(fd uintptr) { text, err = os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd)) })
	if err != nil {
		t.Fatal(err)
	}
	var tfd int
	var events uint32
	if _, err := fmt.Sscanf(string(text[bytes.Index(text, []byte("tfd:")):]), "tfd: %d events: %x", &tfd, &events); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return events &^ (unix.EPOLLERR | unix.EPOLLHUP)
}

// Nobody is woken for room who does not wait for it.
func TestConnAsksForNoRoom(t *testing.T) {
	c, peer := taken(t)
	if got, want := asked(t, c.raw.in), uint32(unix.EPOLLIN|unix.EPOLLRDHUP); got != want {
		t.Errorf("asks for %#x to read, want %#x", got, want)
	}
	if got := asked(t, c.raw.out); got != 0 {
		t.Errorf("asks for %#x and writes nothing", got)
	}
	full, done := make(chan struct{}), make(chan error, 1)
	go func() {
		chunk, calls := make([]byte, 64<<10), 0
		done <- c.raw.Write(func(fd uintptr) bool {
			switch calls++; calls {
			case 1:
				for err := error(nil); err == nil; {
					_, err = Write(int(fd), chunk)
				}
			case 2: // there may have been room meanwhile
				close(full)
			default:
				return true
			}
			return false
		})
	}()
	<-full
	for deadline := time.Now().Add(10 * time.Second); asked(t, c.raw.out) != unix.EPOLLOUT; {
		if time.Now().After(deadline) {
			t.Fatal("does not ask for room")
		}
	}
	go io.Copy(io.Discard, peer) // a unix socket has room when three quarters of it are free
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := asked(t, c.raw.out); got != 0 {
		t.Errorf("asks for %#x after it has written", got)
	}
}

func TestConnEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(*Conn) error
		want error
	}{
		"deadline": {func(c *Conn) error { return c.SetDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
		"close":    {(*Conn).Close, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := taken(t)
			begun, results := make(chan struct{}, 3), make(chan error) // Write tries twice
			go func() {
				results <- c.raw.Read(func(uintptr) bool { begun <- struct{}{}; return false })
			}()
			go func() {
				full := make([]byte, 64<<10)
				results <- c.raw.Write(func(fd uintptr) bool {
					for {
						if _, err := Write(int(fd), full); err != nil {
							begun <- struct{}{}
							return err != unix.EAGAIN
						}
					}
				})
			}()
			for range cap(begun) {
				<-begun
			}
			if err := tt.end(c); err != nil {
				t.Error(err)
			}
			for range 2 {
				if err := <-results; !errors.Is(err, tt.want) {
					t.Errorf("error is %v, want %v", err, tt.want)
				}
			}
			if err := c.raw.Read(func(uintptr) bool { return false }); !errors.Is(err, tt.want) {
				t.Errorf("error of the next is %v, want %v", err, tt.want)
			}
		})
	}
}

// Neither a Conn that was closed nor one that could not be made leaves a descriptor.
func TestConnLeavesNothing(t *testing.T) {
	taken(t) // the runtime's poller has its own
	before := descriptors(t)
	c, peer := taken(t)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.raw.Control(func(uintptr) {}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := peer.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the other end reads: %v", err)
	}
	peer.Close()
	limited, other := net.Pipe()
	defer limited.Close()
	defer other.Close()
	if _, err := Take(limited); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("take a pipe of no kernel's: %v", err)
	}
	if after := descriptors(t); after != before {
		t.Errorf("descriptors before: %s, after: %s", before, after)
	}
}

func descriptors(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}
