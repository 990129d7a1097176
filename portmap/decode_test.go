package portmap

import (
	"encoding/binary"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

func TestDestinationRoundTrip(t *testing.T) {
	for _, d := range []destination{
		{addr: netip.MustParseAddr("10.200.1.2")},
		{addr: netip.MustParseAddr("2001:db8::1")},
		{addr: netip.MustParseAddr("fe80::1"), ifindex: 7},
	} {
		msg := d.control()
		if d.addr.Is4() {
			// The kernel fills in the header's destination, which it ignores in what we send.
			copy(msg[unix.CmsgLen(0)+8:], d.addr.AsSlice())
		}
		if got, ok := parseDestination(msg); !ok || got != d {
			t.Errorf("parseDestination(%v.control()) = %v, %v", d, got, ok)
		}
	}
	if msg := (destination{}).control(); msg != nil {
		t.Errorf("control message of no destination: %x", msg)
	}
}

func TestParseDestinationRefuses(t *testing.T) {
	broadcast := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: 1, Spec_dst: [4]byte{10, 0, 0, 1}, Addr: [4]byte{10, 0, 0, 255}})
	multicast := destination{addr: netip.MustParseAddr("ff02::1")}.control()
	short := make([]byte, unix.CmsgSpace(4))
	*(*unix.Cmsghdr)(unsafe.Pointer(&short[0])) = unix.Cmsghdr{Level: unix.IPPROTO_IP, Type: unix.IP_PKTINFO, Len: uint64(unix.CmsgLen(4))}
	for name, msg := range map[string][]byte{
		"nothing": nil, "broadcast": broadcast, "multicast": multicast, "short": short, "cut": broadcast[:10],
		"another kind": unix.UnixRights(1),
	} {
		if d, ok := parseDestination(msg); ok {
			t.Errorf("%s: taken for %v", name, d)
		}
	}
}

func FuzzParseDestination(f *testing.F) {
	f.Add(destination{addr: netip.MustParseAddr("10.200.1.2")}.control())
	f.Add(destination{addr: netip.MustParseAddr("fe80::1"), ifindex: 7}.control())
	f.Add(unix.UnixRights(1, 2))
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, ok := parseDestination(b); ok && (!d.addr.IsValid() || d.addr.Is6() && d.addr.IsMulticast()) {
			t.Errorf("parseDestination(%x) = %v", b, d)
		}
	})
}

// segments is the control message that the kernel puts beside a burst.
func segments(size int32) []byte {
	b := make([]byte, unix.CmsgSpace(4))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_GRO
	h.SetLen(unix.CmsgLen(4))
	binary.NativeEndian.PutUint32(b[unix.CmsgLen(0):], uint32(size))
	return b
}

func TestSegmentSize(t *testing.T) {
	info := destination{addr: netip.MustParseAddr("2001:db8::1")}.control()
	for _, tt := range []struct {
		name string
		oob  []byte
		want int
	}{
		{"nothing", nil, 0},
		{"a destination", info, 0},
		{"a burst", segments(1200), 1200},
		{"a burst for a destination", append(segments(1200), info...), 1200},
		{"the other way round", append(slices.Clone(info), segments(1200)...), 1200},
		{"negative", segments(-1), 0},
		{"cut", segments(1200)[:unix.CmsgLen(2)], 0},
	} {
		if got := segmentSize(tt.oob); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
}

func FuzzSegmentSize(f *testing.F) {
	f.Add(segments(1200))
	f.Add(append(segments(0), destination{addr: netip.MustParseAddr("10.200.1.2")}.control()...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n := segmentSize(b); n < 0 {
			t.Errorf("segmentSize(%x) = %d", b, n)
		}
	})
}

func TestParseSocket(t *testing.T) {
	// As a little-endian machine prints them.
	for _, tt := range []struct {
		line string
		want hostSocket
		ok   bool
	}{
		{"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode", hostSocket{}, false},
		{"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31337 1 0000 100",
			hostSocket{netip.MustParseAddrPort("127.0.0.1:8080"), true, 1000, 31337}, true},
		{"   1: 0101A8C0:A1B2 08080808:01BB 01 00000000:00000000 00:00000000 00000000     0        0 42 1 0000 100",
			hostSocket{netip.MustParseAddrPort("192.168.1.1:41394"), false, 0, 42}, true},
		{"   0: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 7 2 0 0",
			hostSocket{netip.MustParseAddrPort("[::1]:53"), true, 0, 7}, true},
		{"   0: B80D0120000000000000000001000000:0050 0:0 0A 0:0 0:0 0 0 0 8",
			hostSocket{netip.MustParseAddrPort("[2001:db8::1]:80"), true, 0, 8}, true},
		{"   0: 0100:1F90 0:0 0A 0:0 0:0 0 0 0 8", hostSocket{}, false},
		{"   0: 0100007F 0:0 0A 0:0 0:0 0 0 0 8", hostSocket{}, false},
		{"   0: 0100007F:1F90 0:0 0A 0:0 0:0 0 0 0 x", hostSocket{}, false},
		{"   0: 0100007F:1F90 0:0 0A 0:0 0:0 0 -1 0 8", hostSocket{}, false},
		{"", hostSocket{}, false},
	} {
		got, ok := parseSocket(tt.line)
		if ok != tt.ok || ok && got != tt.want {
			t.Errorf("parseSocket(%q)\n got %+v, %v\nwant %+v, %v", tt.line, got, ok, tt.want, tt.ok)
		}
	}
}

func FuzzParseSocket(f *testing.F) {
	for _, file := range []string{"tcp", "tcp6", "udp", "udp6"} {
		b, err := os.ReadFile("/proc/net/" + file)
		if err != nil {
			f.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			f.Add(line)
		}
	}
	f.Add("   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31337 1 0000 100")
	f.Fuzz(func(t *testing.T, line string) {
		if s, ok := parseSocket(line); ok && !s.local.Addr().IsValid() {
			t.Errorf("parseSocket(%q) = %+v", line, s)
		}
	})
}

func TestInTheWay(t *testing.T) {
	for _, tt := range []struct {
		has, want string
		conflict  bool
	}{
		{"0.0.0.0", "127.0.0.1", true},
		{"127.0.0.1", "0.0.0.0", true},
		{"127.0.0.1", "127.0.0.2", false},
		{"::", "127.0.0.1", true},
		{"::", "::1", true},
		{"::1", "127.0.0.1", false},
		{"::1", "0.0.0.0", false},
		{"::ffff:127.0.0.1", "127.0.0.1", true},
		{"fe80::1", "fe80::1%eth0", true},
	} {
		if got := inTheWay(addr(tt.has), addr(tt.want)); got != tt.conflict {
			t.Errorf("inTheWay(%s, %s) = %v", tt.has, tt.want, got)
		}
	}
}

func TestTarget(t *testing.T) {
	a4, a6 := netip.MustParseAddr("10.200.0.2"), netip.MustParseAddr("2001:db8::2")
	p := usernet.Port{ContainerPort: 80}
	for _, tt := range []struct {
		r    Request
		host string
		want netip.Addr
	}{
		{Request{Port: p, Addr4: a4, Addr6: a6}, "0.0.0.0", a4},
		{Request{Port: p, Addr4: a4, Addr6: a6}, "::", a6},
		{Request{Port: p, Addr4: a4}, "::1", a4},
		{Request{Port: p, Addr6: a6}, "127.0.0.1", a6},
	} {
		if got, want := tt.r.targets(addr(tt.host))[0], netip.AddrPortFrom(tt.want, 80); got != want {
			t.Errorf("%v: clients of %s go to %v, want %v", tt.r, tt.host, got, want)
		}
	}
}
