//go:build linux

package flows

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/nettest"
)

// request is an echo request.
func request(src, dst netip.Addr, id, seq uint16, data []byte) []byte {
	m := make([]byte, icmpHdrLen, icmpHdrLen+len(data))
	m[0] = echoRequest6
	if src.Is4() {
		m[0] = echoRequest4
	}
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], seq)
	m = append(m, data...)
	putSum(m, src, dst)
	return m
}

// ping sends an echo request of a guest.
func (n *network) ping(guest, dst netip.Addr, hops uint8, id, seq uint16, data []byte) {
	m := request(guest, dst, id, seq, data)
	var b [ipv6HdrLen]byte
	proto := uint8(protoICMP6)
	if guest.Is4() {
		proto = protoICMP4
	}
	n.Echo(guest, dst, hops, header(b[:putIP(b[:], proto, len(m), guest, dst)]), m)
}

func (n *network) wantReply(t *testing.T, guest, dst netip.Addr, id, seq uint16, data []byte) {
	t.Helper()
	a := next(t, n.messages)
	kind := byte(echoReply6)
	if guest.Is4() {
		kind = echoReply4
	}
	if a.from.Addr() != dst || a.to.Addr() != guest {
		t.Errorf("from %s to %s, want from %s to %s", a.from.Addr(), a.to.Addr(), dst, guest)
	}
	if icmpSum(a.payload, dst, guest) != 0xffff {
		t.Error("wrong checksum")
	}
	m := a.payload
	if m[0] != kind || m[1] != 0 || binary.BigEndian.Uint16(m[4:]) != id || binary.BigEndian.Uint16(m[6:]) != seq || !bytes.Equal(m[8:], data) {
		t.Errorf("reply % x, want type %d, id %d, seq %d and the data sent", m[:min(len(m), 32)], kind, id, seq)
	}
}

// Two guests may use the same identifier and number at once.
func TestEcho(t *testing.T) {
	versions(t, func(t *testing.T, guest, alias, local netip.Addr) {
		n := start(t, nil)
		for i, size := range []int{0, 1, 56, 1400, 20000} {
			data := bytes.Repeat([]byte{7}, size)
			n.ping(guest, alias, 64, 0x1234, uint16(i), data)
			n.wantReply(t, guest, alias, 0x1234, uint16(i), data)
			n.ping(guest.Next(), local, 64, 0x1234, uint16(i), data)
			n.wantReply(t, guest.Next(), local, 0x1234, uint16(i), data)
		}
		if s := n.Stats(); s.Echoes != 0 || s.EchoRefused != 0 {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestBrokenEchoes(t *testing.T) {
	n := start(t, nil)
	good := request(guest4, alias4, 1, 1, []byte("abc"))
	flipped := bytes.Clone(good)
	flipped[10] ^= 1
	reply := bytes.Clone(good)
	reply[0] = echoReply4
	putSum(reply, guest4, alias4)
	for i, m := range [][]byte{nil, good[:7], flipped, reply} {
		n.Echo(guest4, alias4, 64, nil, m)
		if s := n.Stats(); s.EchoRefused != uint64(i+1) {
			t.Errorf("% x was sent on", m)
		}
	}
	n.Echo(guest4, alias4, 64, nil, good)
	n.wantReply(t, guest4, alias4, 1, 1, []byte("abc"))
}

func TestEchoLimits(t *testing.T) {
	nettest.World(t)
	n := start(t, func(f *Flows) {
		f.echo4.waiting.total, f.echo4.waiting.each = 6, 4
		f.echo4.patience = 100 * time.Millisecond
	})
	for i := range 10 { // nobody is there
		n.ping(guest4, nettest.Silent4, 64, 1, uint16(i), nil)
	}
	if s := n.Stats(); s.Echoes != 4 || s.EchoRefused != 6 {
		t.Errorf("%d waiting, %d refused, want 4 and 6", s.Echoes, s.EchoRefused)
	}
	for i := range 3 { // another guest still has some
		n.ping(guest4.Next(), nettest.Silent4, 64, 1, uint16(i), nil)
	}
	if s := n.Stats(); s.Echoes != 6 || s.EchoRefused != 7 {
		t.Errorf("%d waiting, %d refused, want 6 and 7", s.Echoes, s.EchoRefused)
	}
	await(t, func() bool { return n.Stats().Echoes == 0 })
	n.ping(guest4, alias4, 64, 1, 99, nil)
	n.wantReply(t, guest4, alias4, 1, 99, nil)
}

func TestEchoErrors(t *testing.T) {
	nettest.World(t)
	for _, v := range []struct{ guest, far, closed, router netip.Addr }{
		{guest4, nettest.Far4, nettest.Closed4, nettest.Router4},
		{guest6, nettest.Far6, nettest.Closed6, nettest.Router6},
	} {
		v4 := v.guest.Is4()
		t.Run(fmt.Sprintf("v4=%t", v4), func(t *testing.T) {
			n := start(t, nil)
			exceeded, denied := timeExceeded(v4), icmperror.Prohibited(v4)
			wantQuoted := func(want icmperror.Message, from, dst netip.Addr, seq uint16) {
				t.Helper()
				q := n.wantError(t, want, from, v.guest, dst)
				if id, s := binary.BigEndian.Uint16(q[4:]), binary.BigEndian.Uint16(q[6:]); id != 77 || s != seq {
					t.Errorf("quotes id %d, seq %d, want 77, %d", id, s, seq)
				}
			}
			n.ping(v.guest, v.far, 1, 77, 1, []byte("x"))
			wantQuoted(exceeded, v.router, v.far, 1)
			n.ping(v.guest, v.closed, 64, 77, 2, []byte("x"))
			wantQuoted(denied, v.router, v.closed, 2)
			// The router says that it is too long for the way, and then the host knows.
			for seq := range uint16(2) {
				n.ping(v.guest, v.far, 64, 77, 3+seq, make([]byte, 1450))
				from := v.router
				if seq > 0 {
					from = v.far
				}
				wantQuoted(icmperror.TooBig(v4, nettest.Narrow), from, v.far, 3+seq)
			}
			n.ping(v.guest, v.far, 64, 77, 9, make([]byte, 1000))
			n.wantReply(t, v.guest, v.far, 77, 9, make([]byte, 1000))
			if s := n.Stats(); s.Echoes != 0 {
				t.Errorf("%d echoes wait", s.Echoes)
			}
		})
	}
}

// Where no socket may be opened, the log says so, once.
func TestNoPingSocket(t *testing.T) {
	var log strings.Builder
	n := start(t, func(f *Flows) { f.cfg.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	unprivileged(t, func() {
		for i := range 5 {
			n.ping(guest4, alias4, 64, 1, uint16(i), nil)
		}
	})
	if s := n.Stats(); s.EchoRefused != 5 || s.Echoes != 0 {
		t.Errorf("stats %+v", s)
	}
	if got := strings.Count(log.String(), "guests cannot ping"); got != 1 {
		t.Errorf("said %d times, want once:\n%s", got, log.String())
	}
}

// The socket that needs no privileges, where the sysctl allows it.
func TestPingSocket(t *testing.T) {
	setSysctl(t, "net/ipv4/ping_group_range", "0 1000")
	versions(t, func(t *testing.T, guest, alias, _ netip.Addr) {
		n := start(t, nil)
		unprivileged(t, func() { n.ping(guest, alias, 64, 5, 6, []byte("x")) })
		n.wantReply(t, guest, alias, 5, 6, []byte("x"))
		if s := n.echo4.socket; guest.Is4() && s.raw {
			t.Error("the socket is a raw one")
		}
	})
}
