//go:build linux

package flows

import (
	"bytes"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/usernet/usernet/internal/icmperror"
)

// What a socket for echo requests may receive: anything.
func FuzzParseError(f *testing.F) {
	for _, v := range []struct{ src, dst netip.Addr }{{guest4, alias4}, {guest6, alias6}} {
		var ip [ipv6HdrLen]byte
		m := request(v.src, v.dst, 7, 8, []byte("data"))
		proto, e := uint8(protoICMP6), icmperror.TooBig(false, 1280)
		if v.src.Is4() {
			proto, e = protoICMP4, icmperror.TooBig(true, 1280)
		}
		e.From = v.dst
		n := putIP(ip[:], proto, len(m), v.src, v.dst)
		f.Add(v.src.Is4(), putError(make([]byte, maxError6), e, v.src, ip[:n], m))
	}
	f.Fuzz(func(t *testing.T, v4 bool, m []byte) {
		e, q, ok := parseError(v4, m)
		if !ok {
			return
		}
		if !icmperror.Passes(v4, e.Type) || q.dst.Is4() != v4 || len(q.message) < icmpHdrLen || !bytes.HasSuffix(m, q.message) {
			t.Errorf("%+v, %+v", e, q)
		}
	})
}

// What a guest says is an echo request, and the header of its packet.
func FuzzEcho(f *testing.F) {
	var ip [ipv4HdrLen]byte
	m := request(guest4, forbidden4, 7, 8, []byte("data"))
	putIP(ip[:], protoICMP4, len(m), guest4, forbidden4)
	f.Add(true, ip[:], m)
	f.Add(false, ip[:], request(guest6, forbidden6, 7, 8, nil))
	flows := New(Config{
		Resolve:  func(netip.Addr) (netip.Addr, bool) { return netip.Addr{}, false },
		SendUDP:  func(_, _ netip.AddrPort, _ [][]byte) {},
		SendICMP: func(from, to netip.Addr, m []byte) { checkError(f, from, to, m) },
		Log:      slog.New(slog.DiscardHandler),
	})
	f.Fuzz(func(_ *testing.T, v4 bool, header, m []byte) {
		client, dst := guest6, forbidden6
		if v4 {
			client, dst = guest4, forbidden4
		}
		flows.errors = icmperror.Limit{}
		flows.Echo(client, dst, 64, header, m)
		if len(m) >= icmpHdrLen {
			putSum(m, client, dst)
			flows.Echo(client, dst, 64, header, m)
		}
		flows.report(icmperror.PortUnreachable(v4), client, dst, header, m)
	})
}

func checkError(t testing.TB, from, to netip.Addr, m []byte) {
	limit := maxError6 - ipv6HdrLen
	if to.Is4() {
		limit = maxError4 - ipv4HdrLen
	}
	if len(m) < icmpHdrLen || len(m) > limit || from.Is4() != to.Is4() || icmpSum(m, from, to) != 0xffff {
		t.Errorf("message of %d bytes from %s to %s: % x", len(m), from, to, m)
	}
}

func TestSum(t *testing.T) {
	// RFC 1071, section 3.
	b := []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}
	if got := sum(b, 0); got != 0xddf2 {
		t.Errorf("%#x, want 0xddf2", got)
	}
	for i := range b {
		var want uint32
		for k, x := range b[:i] {
			want += uint32(x) << (8 * (1 - k%2))
		}
		want = want>>16 + want&0xffff
		if got := sum(b[:i], 0); uint32(got) != want {
			t.Errorf("of %d bytes: %#x, want %#x", i, got, want)
		}
	}
}

func TestIsWhole(t *testing.T) {
	cut4, whole4, whole6, cut6 := make([]byte, 20), make([]byte, 20), make([]byte, 40), make([]byte, 48)
	cut4[0], whole4[0], whole6[0], cut6[0] = 0x45, 0x45, 0x60, 0x60
	whole4[6], whole6[6], cut6[6] = 0x40, protoUDP, 44
	for _, v := range []struct {
		header []byte
		want   bool
	}{{nil, false}, {cut4, false}, {whole4, true}, {whole6, true}, {cut6, false}, {whole6[:39], false}} {
		if got := isWhole(v.header); got != v.want {
			t.Errorf("% x: %t", v.header, got)
		}
	}
}
