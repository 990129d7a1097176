//go:build linux && !race

package flows

import (
	"log/slog"
	"net/netip"
	"testing"
)

func TestSteadyStateDoesNotAllocate(t *testing.T) {
	server := echoServer(t, local4)
	answers := make(chan struct{}, 8)
	f := New(Config{
		Resolve: resolve,
		SendUDP: func(_, _ netip.AddrPort, payloads [][]byte) {
			for range payloads {
				answers <- struct{}{}
			}
		},
		SendICMP: func(_, _ netip.Addr, _ []byte) { answers <- struct{}{} },
		Log:      slog.New(slog.DiscardHandler),
	})
	run(t, f)
	client, dst := netip.AddrPortFrom(guest4, 1), netip.AddrPortFrom(alias4, server.Port())
	var b [ipv4HdrLen + udpHdrLen]byte
	quoted := header(putUDP(b[:], client, dst, 4))
	message := request(guest4, alias4, 1, 1, make([]byte, 56))
	one, burst, uneven := [][]byte{{1, 2, 3, 4}}, [][]byte{{1, 2}, {3, 4}, {5}}, [][]byte{{1}, {2, 3}}
	for _, c := range []struct {
		name    string
		answers int
		send    func()
	}{
		{"UDP", 1, func() { f.UDP(client, dst, 64, quoted, one) }},
		{"a burst", 3, func() { f.UDP(client, dst, 64, quoted, burst) }},
		{"an uneven burst", 2, func() { f.UDP(client, dst, 64, quoted, uneven) }},
		{"echo", 1, func() { f.Echo(guest4, alias4, 64, quoted[:ipv4HdrLen], message) }},
		{"UDP, many hops", 1, func() { f.UDP(client, dst, 200, quoted, one) }},
	} {
		exchange := func() {
			c.send()
			for range c.answers {
				<-answers
			}
		}
		exchange()
		if n := testing.AllocsPerRun(1000, exchange); n > 0 {
			t.Errorf("%s: %v allocations for each exchange, want none", c.name, n)
		}
	}
}
