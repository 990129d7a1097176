//go:build linux && !race

package flows

import (
	"log/slog"
	"net/netip"
	"testing"
)

func TestSteadyStateDoesNotAllocate(t *testing.T) {
	server := echoServer(t, local4)
	answers := make(chan struct{}, 1)
	f := New(Config{
		Resolve:  resolve,
		SendUDP:  func(_, _ netip.AddrPort, _ []byte) { answers <- struct{}{} },
		SendICMP: func(_, _ netip.Addr, _ []byte) { answers <- struct{}{} },
		Log:      slog.New(slog.DiscardHandler),
	})
	run(t, f)
	client, dst := netip.AddrPortFrom(guest4, 1), netip.AddrPortFrom(alias4, server.Port())
	var b [ipv4HdrLen + udpHdrLen]byte
	quoted := header(putUDP(b[:], client, dst, 4))
	message := request(guest4, alias4, 1, 1, make([]byte, 56))
	whole, parts, short := [][]byte{{1, 2, 3, 4}}, [][]byte{{1, 2}, {3, 4}}, [][]byte{{1}}
	for name, send := range map[string]func(){
		"UDP":            func() { f.UDP(client, dst, 64, quoted, whole) },
		"UDP in parts":   func() { f.UDP(client, dst, 64, quoted, parts) },
		"echo":           func() { f.Echo(guest4, alias4, 64, quoted[:ipv4HdrLen], message) },
		"UDP, many hops": func() { f.UDP(client, dst, 200, quoted, short) },
	} {
		exchange := func() { send(); <-answers }
		exchange()
		if n := testing.AllocsPerRun(1000, exchange); n > 0 {
			t.Errorf("%s: %v allocations for each exchange, want none", name, n)
		}
	}
}
