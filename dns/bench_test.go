//go:build linux

package dns

import (
	"log/slog"
	"net"
	"net/netip"
	"testing"

	miekg "github.com/miekg/dns"
)

// BenchmarkAnswer is what the resolver does with a question that it can answer, without the sockets.
func BenchmarkAnswer(b *testing.B) {
	r := localResolver(func() []netip.AddrPort { return nil })
	cached := parsed(b, question("www.example.com", miekg.TypeA).SetEdns0(1232, false))
	r.cache.put(string(cached.appendKey(nil)), packed(b, 0, []string{wwwA, wwwA2}, nil))
	for _, bm := range []struct {
		name string
		q    *miekg.Msg
	}{
		{"local", question("web.dns.podman", miekg.TypeA)},
		{"local EDNS", question("web.dns.podman", miekg.TypeA).SetEdns0(1232, false)},
		{"missing", question("nobody.dns.podman", miekg.TypeA)},
		{"reverse", question("2.1.200.10.in-addr.arpa", miekg.TypePTR)},
		{"cached", question("www.example.com", miekg.TypeA).SetEdns0(1232, false)},
	} {
		b.Run(bm.name, func(b *testing.B) {
			msg, err := bm.q.Pack()
			if err != nil {
				b.Fatal(err)
			}
			var q query
			out := make([]byte, 0, miekg.MaxMsgSize)
			b.ReportAllocs()
			for b.Loop() {
				if reply, via := r.answer(&q, out, msg, peer{by: overUDP}); reply == nil || via != nil {
					b.Fatal("not answered")
				}
			}
		})
	}
}

// BenchmarkUDP is one client that asks one question after the other; with upstream there is a new question each time.
func BenchmarkUDP(b *testing.B) {
	u := newUpstream(b, answers(wwwA))
	for _, bm := range []struct {
		name, ask string
		qtype     uint16
	}{{"local", "web", miekg.TypeA}, {"cached", "www.example.com", miekg.TypeA}, {"upstream", "www.example.com", miekg.TypeTXT}} {
		b.Run(bm.name, func(b *testing.B) {
			s := serve(b, Config{Sources: []Source{testRecords()}, Servers: to(u), Log: slog.New(slog.DiscardHandler)})
			c, err := net.Dial("udp", s.addr)
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			msg, err := question(bm.ask, bm.qtype).Pack()
			if err != nil {
				b.Fatal(err)
			}
			buf := make([]byte, miekg.MaxMsgSize)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Write(msg); err != nil {
					b.Fatal(err)
				}
				if n, err := c.Read(buf); err != nil || rcodeOf(buf[:n]) != 0 {
					b.Fatal(err)
				}
			}
		})
	}
}
