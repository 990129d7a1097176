package icmperror

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// What the kernel queues for a socket: somebody's error, and its own.
func TestQueue(t *testing.T) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetMTU(lo, 1500); err != nil {
		t.Fatal(err)
	}
	for _, to := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		t.Run(to.String(), func(t *testing.T) {
			fd := dialClosed(t, to)
			var q Queue
			if e, ok := q.Read(fd); ok {
				t.Fatalf("%+v before anything was sent", e)
			}
			if _, err := unix.Write(fd, []byte("hello")); err != nil {
				t.Fatal(err)
			}
			want := PortUnreachable(to.Is4())
			want.From = to
			if e := next(t, &q, fd); e.Message != want || e.Local || string(e.Quoted) != "hello" || e.To != to {
				t.Errorf("%+v, want %+v about what went to %s", e, want, to)
			}
			if _, err := unix.Write(fd, bytes.Repeat([]byte{7}, 2000)); err != unix.EMSGSIZE {
				t.Fatalf("write of more than the MTU: %v", err)
			}
			if e := next(t, &q, fd); e.Message != TooBig(to.Is4(), 1500) || !e.Local {
				t.Errorf("%+v, want that the MTU is 1500", e)
			}
			if e, ok := q.Read(fd); ok {
				t.Errorf("%+v, and nothing was sent", e)
			}
		})
	}
}

// dialClosed opens a UDP socket that queues errors and does not cut, connected to a port where nobody listens.
func dialClosed(t *testing.T, to netip.Addr) (fd int) {
	t.Helper()
	l, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 0)))
	if err != nil {
		t.Fatal(err)
	}
	port := l.LocalAddr().(*net.UDPAddr).Port
	l.Close()
	family, level, discover := unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: port, Addr: to.As16()}
	if to.Is4() {
		family, level, discover = unix.AF_INET, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
		sa = &unix.SockaddrInet4{Port: port, Addr: to.As4()}
	}
	if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := Ask(fd, to.Is4()); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptInt(fd, level, discover, unix.IP_PMTUDISC_DO); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, sa); err != nil {
		t.Fatal(err)
	}
	return fd
}

// next waits for an entry.
func next(t *testing.T, q *Queue, fd int) Entry {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(fd)}} // POLLERR is always asked for
	if _, err := unix.Poll(p, int((10 * time.Second).Milliseconds())); err != nil {
		t.Fatal(err)
	}
	e, ok := q.Read(fd)
	if !ok {
		t.Fatal("no entry within 10 s")
	}
	return e
}

// Rubbish in an error queue, which the kernel fills from packets of anybody, is harmless.
func FuzzParse(f *testing.F) {
	entry := func(level, kind int32, data ...byte) []byte {
		b := make([]byte, unix.CmsgSpace(len(data)))
		binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(len(data))))
		binary.NativeEndian.PutUint32(b[8:], uint32(level))
		binary.NativeEndian.PutUint32(b[12:], uint32(kind))
		copy(b[unix.CmsgLen(0):], data)
		return b
	}
	ee := func(errno unix.Errno, origin, kind, code byte, info uint32) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(errno))
		b = append(b, origin, kind, code, 0)
		return append(binary.NativeEndian.AppendUint32(b, info), 0, 0, 0, 0)
	}
	sa4 := []byte{unix.AF_INET, 0, 0, 0, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0}
	from := netip.MustParseAddr("192.0.2.1")
	redirect := ee(unix.ECONNREFUSED, unix.SO_EE_ORIGIN_ICMP, 5, 0, 0)
	for _, c := range []struct {
		control   []byte
		want      Message
		local, ok bool
	}{
		{nil, Message{}, false, false},
		{entry(unix.IPPROTO_IP, unix.IP_RECVERR, append(ee(unix.ECONNREFUSED, 2, 3, 3, 9), sa4...)...),
			Message{From: from, Type: 3, Code: 3}, false, true},
		{entry(unix.IPPROTO_IP, unix.IP_RECVERR, append(ee(unix.EMSGSIZE, 2, 3, 4, 1400), sa4...)...),
			Message{From: from, Type: 3, Code: 4, MTU: 1400}, false, true},
		{entry(unix.IPPROTO_IP, unix.IP_RECVERR, ee(unix.EMSGSIZE, 1, 0, 0, 1400)...), TooBig(true, 1400), true, true},
		{entry(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, ee(unix.EMSGSIZE, 1, 0, 0, 1400)...), TooBig(false, 1400), true, true},
		{entry(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, ee(unix.EMSGSIZE, 3, 2, 0, 1400)...), TooBig(false, 1400), false, true},
		{entry(unix.IPPROTO_IP, unix.IP_RECVERR, ee(unix.EPERM, 1, 0, 0, 0)...), Message{}, false, false},
		{entry(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, ee(unix.EMSGSIZE, 2, 3, 4, 1400)...), Message{}, false, false},
		{entry(unix.IPPROTO_IP, unix.IP_TTL, ee(unix.EMSGSIZE, 2, 3, 4, 1400)...), Message{}, false, false},
		{entry(unix.IPPROTO_IP, unix.IP_RECVERR, redirect...), Message{}, false, false},
		{entry(unix.IPPROTO_IP, unix.IP_RECVERR, redirect[:15]...), Message{}, false, false},
	} {
		f.Add(c.control)
		got, local, ok := parse(c.control)
		if !c.ok {
			got = Message{} // it may say what it was
		}
		if got != c.want || local != c.local || ok != c.ok {
			f.Errorf("% x: %+v, %t, %t, want %+v, %t, %t", c.control, got, local, ok, c.want, c.local, c.ok)
		}
	}
	f.Fuzz(func(t *testing.T, control []byte) {
		m, _, ok := parse(control)
		if ok && !Passes(true, m.Type) && !Passes(false, m.Type) {
			t.Errorf("%+v passes", m)
		}
	})
}
