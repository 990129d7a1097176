package l2

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// packetGuest adds a guest on a connected socket of packets.
func (b *bed) packetGuest(i int, host, mine PacketConn, opts Options) *guest {
	b.t.Helper()
	l, err := Packets(host, opts)
	if err != nil {
		b.t.Fatal(err)
	}
	return b.guestOn(i, l, mine)
}

func (b *bed) guestOn(i int, host *Link, mine PacketConn) *guest {
	b.t.Helper()
	p, ended := b.run(host, PortConfig{})
	l, err := Packets(mine, Options{})
	if err != nil {
		b.t.Fatal(err)
	}
	return &guest{Link: l, t: b.t, conn: mine, port: p, ended: ended, mac: guestMAC(i)}
}

// TestSeqpacket is BESS: frames as packets of a connection.
func TestSeqpacket(t *testing.T) {
	b := newBed(t, Config{})
	host, mine := socketpair(t, unix.SOCK_SEQPACKET)
	one := b.packetGuest(1, host, mine, Options{MTU: 1500})
	two := b.stream(2, Options{}, PortConfig{})
	one.say(broadcast, 1)
	two.hears(1)
	for _, n := range []int{0, 1, 13, 3000} { // nothing, too short, too long for the buffers
		if _, err := one.conn.Write(make([]byte, n)); err != nil {
			t.Fatal(err)
		}
	}
	one.say(two.mac, 2)
	two.hears(2)
	if s := one.port.Stats(); s.Invalid != 4 {
		t.Errorf("%d invalid, want 4", s.Invalid)
	}
	var many []Frame
	for i := range uint32(200) { // more than one system call takes
		many = append(many, Frame{Head: frame(one.mac, two.mac, 1514, i)})
	}
	two.send(many...)
	for i := range uint32(200) {
		one.hears(i)
	}
	one.conn.Close()
	if err := <-one.ended; err != io.EOF && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("port ends with %v", err)
	}
}

func unixgram(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// dialUnixgram is vfkit's end: bound to a name, connected to ours.
func dialUnixgram(t testing.TB, path, to string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}, &net.UnixAddr{Name: to, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestVfkit: the peer is who sends first, with or without the old magic; and when that one is gone, the next one may come.
func TestVfkit(t *testing.T) {
	dir := t.TempDir()
	host := unixgram(t, filepath.Join(dir, "host"))
	b := newBed(t, Config{})
	other := b.stream(9, Options{}, PortConfig{})
	for i, first := range []string{vfkitMagic, "", "x"} {
		name := filepath.Join(dir, []string{"a", "b", "b"}[i]) // a new name, and the same one again
		mine := dialUnixgram(t, name, host.LocalAddr().String())
		nameless := dialUnixgramNameless(t, host)
		if _, err := nameless.Write(make([]byte, 60)); err != nil {
			t.Fatal(err)
		}
		if first != "" {
			if _, err := mine.Write([]byte(first)); err != nil {
				t.Fatal(err)
			}
		}
		one := frame(broadcast, guestMAC(i), 60, 1)
		if _, err := mine.Write(one); err != nil {
			t.Fatal(err)
		}
		l, err := AwaitPeer(t.Context(), host, Options{MTU: 1500})
		if err != nil {
			t.Fatal(err)
		}
		vm := b.guestOn(i, l, mine)
		other.hears(1)
		other.say(vm.mac, 2)
		vm.hears(2)
		vm.say(other.mac, 3)
		other.hears(3)
		if got, want := vm.port.Stats().Invalid, uint64(len(first)/1%4); got != want { // "x" is one, the magic is not
			t.Errorf("%d invalid, want %d", got, want)
		}
		mine.Close()
		select {
		case err := <-vm.ended:
			if !errors.Is(err, errPeerGone) {
				t.Errorf("port ends with %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the port does not notice that its machine is gone")
		}
		if err := unix.Unlink(name); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Fatal(err)
		}
	}
}

func dialUnixgramNameless(t *testing.T, to *net.UnixConn) net.Conn {
	c, err := net.Dial("unixgram", to.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestUDPPeer is -netdev dgram with addresses of IP.
func TestUDPPeer(t *testing.T) {
	host, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	mine, err := net.DialUDP("udp", nil, host.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	if _, err := mine.Write(frame(broadcast, guestMAC(1), 60, 1)); err != nil {
		t.Fatal(err)
	}
	l, err := AwaitPeer(t.Context(), host, Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := newBed(t, Config{})
	two := b.stream(2, Options{}, PortConfig{})
	one := b.guestOn(1, l, mine)
	b.until(func() bool {
		return slices.ContainsFunc(b.sw.Ports(), func(p *Port) bool { return p.Stats().RxFrames == 1 })
	})
	two.say(one.mac, 2)
	one.hears(2)
}

func TestAwaitPeerEnds(t *testing.T) {
	host := unixgram(t, filepath.Join(t.TempDir(), "host"))
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	go cancel(enough)
	if _, err := AwaitPeer(ctx, host, Options{}); !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
	mine := dialUnixgram(t, filepath.Join(t.TempDir(), "vm"), host.LocalAddr().String())
	if _, err := mine.Write(make([]byte, 60)); err != nil {
		t.Fatal(err)
	}
	l, err := AwaitPeer(t.Context(), host, Options{})
	if err != nil {
		t.Fatalf("after one that was ended: %v", err)
	}
	l.Close()
}

// TestFullPeer: a datagram socket whose peer does not read makes its port wait, and nobody else; then all comes in order.
func TestFullPeer(t *testing.T) {
	b := newBed(t, Config{})
	host, mine := socketpair(t, unix.SOCK_DGRAM)
	one := b.packetGuest(1, host, mine, Options{MTU: 1500})
	two := b.stream(2, Options{}, PortConfig{})
	one.say(broadcast, 0)
	two.hears(0)
	const n = 300 // many times max_dgram_qlen, less than the queue
	for i := range uint32(n) {
		two.send(Frame{Head: frame(one.mac, two.mac, 1514, i)})
	}
	b.until(func() bool { return two.port.Stats().RxFrames == n })
	for i := range uint32(n) {
		one.hears(i)
	}
	if s := one.port.Stats(); s.Full != 0 {
		t.Errorf("%d lost", s.Full)
	}
}

// TestRoom: a unix socket that carries a link gets more room than most systems give it, and keeps what it has beyond that.
func TestRoom(t *testing.T) {
	for _, tt := range []struct {
		given int
		more  bool
	}{{64 << 10, true}, {8 << 20, false}} {
		host, _ := socketpair(t, unix.SOCK_STREAM)
		raw, err := host.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		control := func(do func(fd int) error) {
			var failed error
			err := raw.Control(func(fd uintptr) { failed = do(int(fd)) })
			if err = errors.Join(err, failed); err != nil {
				t.Fatal(err)
			}
		}
		room := func() (n int) {
			control(func(fd int) (err error) {
				n, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
				return err
			})
			return n
		}
		control(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, tt.given) })
		before := room()
		Stream(host, Options{})
		if after := room(); after < before || after > before != tt.more {
			t.Errorf("room for %d bytes became %d", before, after)
		}
	}
}
