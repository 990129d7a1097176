package usermode

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// pingGroups sets who may have ping sockets in the test's namespace, which is the netstack's.
func pingGroups(t *testing.T, groups string) {
	t.Helper()
	const path = "/proc/sys/net/ipv4/ping_group_range"
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(groups), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(path, old, 0) })
}

// pinger is a raw ICMP socket in a container.
type pinger struct {
	conn *net.IPConn
	v6   bool
}

func newPinger(t *testing.T, ns *netns.NS, to netip.Addr) *pinger {
	t.Helper()
	p := &pinger{v6: to.Is6()}
	network := "ip4:icmp"
	if p.v6 {
		network = "ip6:ipv6-icmp"
	}
	err := ns.Do(func() (err error) {
		p.conn, err = net.DialIP(network, nil, &net.IPAddr{IP: to.AsSlice()})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.conn.Close() })
	return p
}

// ping sends a request and returns the reply's payload, or nil when none comes in time.
func (p *pinger) ping(t *testing.T, id, seq uint16, payload []byte, timeout time.Duration) []byte {
	t.Helper()
	h := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize))
	reply := byte(header.ICMPv4EchoReply)
	h.SetType(header.ICMPv4Echo)
	h.SetIdent(id)
	h.SetSequence(seq)
	if p.v6 {
		h[0], reply = byte(header.ICMPv6EchoRequest), byte(header.ICMPv6EchoReply)
	} else {
		h.SetChecksum(header.ICMPv4Checksum(h, checksum.Checksum(payload, 0)))
	}
	if _, err := p.conn.Write(append(h, payload...)); err != nil {
		t.Fatal(err)
	}
	p.conn.SetReadDeadline(time.Now().Add(timeout))
	buf := make([]byte, maxDatagram)
	for {
		n, _, err := p.conn.ReadFrom(buf) // without IP header
		if os.IsTimeout(err) || errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		got := header.ICMPv4(buf[:n])
		if len(got) >= header.ICMPv4MinimumSize && got[0] == reply && got.Ident() == id && got.Sequence() == seq {
			return got[header.ICMPv4MinimumSize:]
		}
	}
}

func TestPing(t *testing.T) {
	for name, groups := range map[string]string{"raw socket": "1 0", "ping socket": "0 0"} {
		t.Run(name, func(t *testing.T) {
			pingGroups(t, groups)
			b := newBed(t, usual)
			for _, to := range []netip.Addr{host4.Addr(), host6.Addr()} {
				p := newPinger(t, b.container, to)
				for seq, size := range []int{0, 56, 1472, 4000, 60000} {
					want, _ := io.ReadAll(noise(byte(seq), int64(size)))
					got := p.ping(t, 0xabcd, uint16(seq), want, 5*time.Second)
					if got == nil || !bytes.Equal(got, want) {
						t.Errorf("%s: sent %d bytes, got %d", to, size, len(got))
					}
				}
			}
		})
	}
}

// Two containers may use the same identifier and sequence number for the same destination.
func TestPingSameNumbers(t *testing.T) {
	s := newTestStack(t)
	s.start(t)
	other := guest4.Addr().Next()
	s.send(t, echoRequest(guest4.Addr(), host4.Addr(), 7, 1, []byte("one")))
	s.send(t, echoRequest(other, host4.Addr(), 7, 1, []byte("two")))
	got := map[netip.Addr]string{}
	for range 2 {
		p := s.expect(t, header.ICMPv4ProtocolNumber)
		h := header.ICMPv4(p.Payload())
		if h.Type() != header.ICMPv4EchoReply || h.Ident() != 7 || h.Sequence() != 1 || toAddr(p.SourceAddress()) != host4.Addr() {
			t.Errorf("reply %x", []byte(p))
		}
		if sum := checksum.Checksum(h, 0); sum != 0xffff {
			t.Errorf("checksum %#x", sum)
		}
		got[toAddr(p.DestinationAddress())] = string(h.Payload())
	}
	if got[guest4.Addr()] != "one" || got[other] != "two" {
		t.Errorf("replies: %v", got)
	}
}

// Nobody there, nobody answers: netstack by itself would, for every address.
func TestPingNoReply(t *testing.T) {
	b := newBed(t, usual)
	for _, to := range []netip.Addr{host4.Addr().Next(), forbidden4, netip.MustParseAddr("192.0.2.1"), host6.Addr().Next()} {
		if got := newPinger(t, b.container, to).ping(t, 1, 1, []byte("?"), 200*time.Millisecond); got != nil {
			t.Errorf("%s answers", to)
		}
	}
}

// Requests that are never answered take up a bounded number of places, and not for ever.
func TestPingLimits(t *testing.T) {
	s := newTestStack(t)
	s.echoes.pending = tcprelay.NewQuota(5, 3)
	s.echoes.patience = time.Second
	s.start(t)
	dead := host4.Addr().Next()
	for seq := range uint16(20) {
		s.send(t, echoRequest(guest4.Addr(), dead, 1, seq, nil))
	}
	// What is alive is still reached by others.
	s.send(t, echoRequest(guest4.Addr().Next(), host4.Addr(), 1, 1, nil))
	s.expect(t, header.ICMPv4ProtocolNumber)
	if n := s.echoes.refused.Load(); n != 17 {
		t.Errorf("%d of 20 requests refused, want 17", n)
	}
	eventually(t, "the dead are given up", func() bool {
		s.send(t, echoRequest(guest4.Addr(), host4.Addr(), 1, 2, nil))
		for p := s.next(t, 100*time.Millisecond); p != nil; p = s.next(t, 100*time.Millisecond) {
			if header.ICMPv4(header.IPv4(p).Payload()).Type() == header.ICMPv4EchoReply {
				return true
			}
		}
		return false
	})
}

// Many pings at a time: shared sockets, and every reply finds its sender.
func TestPingFlood(t *testing.T) {
	b := newBed(t, usual)
	var wg sync.WaitGroup
	for id := range uint16(8) {
		p := newPinger(t, b.container, host4.Addr())
		wg.Go(func() {
			for seq := range uint16(100) {
				want := []byte{byte(id), byte(seq)}
				if got := p.ping(t, id, seq, want, 5*time.Second); !bytes.Equal(got, want) {
					t.Errorf("ping %d of %d: %x", seq, id, got)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := countSockets(t, unix.SOCK_RAW); n > 8+2 {
		t.Errorf("%d raw sockets for 8 pingers and one netstack", n)
	}
}

// countSockets counts the process's open sockets of a type.
func countSockets(t *testing.T, kind int) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for fd := range len(entries) + 100 {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil && got == kind {
			n++
		}
	}
	return n
}
