//go:build linux

package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	miekg "github.com/miekg/dns"

	"github.com/usernet/usernet/internal/nettest"
)

func TestServe(t *testing.T) {
	noLeaks(t)
	u := newUpstream(t, answers(wwwA))
	s := serve(t, Config{Sources: []Source{testRecords()}, Servers: to(u)})
	for _, network := range []string{"udp", "tcp"} {
		for name, want := range map[string]string{"web.dns.podman": "10.200.1.2", "www.example.com": "192.0.2.1"} {
			q := question(name, miekg.TypeA)
			m := exchange(t, network, s.addr, q)
			if m.Rcode != 0 || len(m.Answer) != 1 || data(m.Answer)[0] != want || m.Id != q.Id {
				t.Errorf("%s by %s: %v", name, network, m)
			}
		}
	}
}

// What upstream says comes out as it was, whatever it is.
func TestAnswersPassUntouched(t *testing.T) {
	noLeaks(t)
	texts := []string{wwwA, alias}
	for i := range 300 {
		texts = append(texts, fmt.Sprintf("www.example.com. 100 IN TXT %q", strings.Repeat("x", 200)+fmt.Sprint(i)))
	}
	tests := []struct {
		name  string
		qtype uint16
		rrs   []string
		code  int
	}{
		{"unknown type", 65280, []string{`www.example.com. 100 IN TYPE65280 \# 4 0a000001`}, 0},
		{"bad data in a known type", miekg.TypeSVCB, []string{`www.example.com. 100 IN TYPE64 \# 3 000100`}, 0},
		{"signatures", miekg.TypeA, []string{wwwA,
			"www.example.com. 100 IN RRSIG A 8 3 100 20300101000000 20200101000000 1 example.com. AAAA"}, 0},
		{"60 KiB", miekg.TypeTXT, texts, 0},
		{"bad cookie", miekg.TypeMX, nil, miekg.RcodeBadCookie},
		{"not authoritative", miekg.TypeNS, nil, miekg.RcodeNotAuth},
		{"no records", miekg.TypeNAPTR, nil, 0},
	}
	var mu sync.Mutex
	var want *miekg.Msg
	var whole [][]byte // what upstream said by TCP
	u := newUpstream(t, func(w miekg.ResponseWriter, q *miekg.Msg) {
		mu.Lock()
		defer mu.Unlock()
		m := want.Copy()
		m.SetReply(q)
		m.Rcode, m.AuthenticatedData, m.Zero = want.Rcode, true, true
		m.Compress = true
		m.Extra = append(m.Extra, &miekg.OPT{Hdr: miekg.RR_Header{Name: ".", Rrtype: miekg.TypeOPT, Class: 1400},
			Option: []miekg.EDNS0{&miekg.EDNS0_EDE{InfoCode: 23, ExtraText: "why"}}})
		if w.RemoteAddr().Network() == "udp" {
			t.Error("a question that came by TCP was passed on by UDP")
		}
		b, err := m.Pack()
		if err != nil {
			t.Error(err)
		}
		whole = append(whole, b)
		w.Write(b)
	})
	s := serve(t, Config{Servers: to(u)})
	for _, tt := range tests {
		var before []byte
		for _, again := range []bool{false, true} { // from the cache
			mu.Lock()
			want, whole = new(miekg.Msg), nil
			want.Rcode = tt.code
			for _, text := range tt.rrs {
				want.Answer = append(want.Answer, rr(text))
			}
			mu.Unlock()
			q := question("www.example.com", tt.qtype).SetEdns0(65535, true)
			got := exchangeRaw(t, "tcp", s.addr, q)
			mu.Lock()
			said := whole
			mu.Unlock()
			kept := again && tt.code == 0 && len(tt.rrs) > 0
			switch {
			case kept && len(said) == 0:
				said = [][]byte{before}
			case kept || len(said) != 1:
				t.Fatalf("%s, again %v: asked upstream %d times", tt.name, again, len(said))
			}
			before = said[0]
			if len(got) < headerLen || u16(got, 0) != q.Id || !bytes.Equal(ageless(got), ageless(before)) {
				t.Errorf("%s, again %v: got %d bytes, want %d\n%x\n%x", tt.name, again, len(got), len(before), got, before)
			}
		}
	}
}

// ageless is a message without its ID and the TTLs that count down.
func ageless(msg []byte) []byte {
	_, ttls := lifetime(msg)
	for _, off := range ttls {
		clear(msg[off : off+4])
	}
	return msg[2:]
}

// exchangeRaw asks and returns the bytes of the reply.
func exchangeRaw(t testing.TB, network, server string, q *miekg.Msg) []byte {
	t.Helper()
	conn, err := miekg.DialTimeout(network, server, testPatience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.UDPSize = miekg.MaxMsgSize
	conn.SetDeadline(time.Now().Add(testPatience))
	if err := conn.WriteMsg(q); err != nil {
		t.Fatal(err)
	}
	msg, err := conn.ReadMsgHeader(nil)
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

// A reply by UDP is as long as the client takes; by TCP it is whole. Upstream is asked once for all of them.
func TestReplySizes(t *testing.T) {
	noLeaks(t)
	var rrs []string
	for i := range 100 {
		rrs = append(rrs, fmt.Sprintf("www.example.com. 100 IN AAAA 2001:db8::%x", i+1))
	}
	u := newUpstream(t, func(w miekg.ResponseWriter, q *miekg.Msg) {
		m := reply(q, rrs...)
		m.Compress = true
		if w.RemoteAddr().Network() == "udp" {
			size := 512
			if opt := q.IsEdns0(); opt != nil {
				size = int(opt.UDPSize())
			}
			m.Truncate(size)
		}
		w.WriteMsg(m)
	})
	s := serve(t, Config{Servers: to(u)})
	for _, tt := range []struct {
		network string
		size    uint16 // 0: no EDNS
		answers int
	}{
		{"udp", 0, (512 - 33) / 28}, {"udp", 100, (512 - 33 - 11) / 28}, {"udp", 512, (512 - 33 - 11) / 28},
		{"udp", 1232, (1232 - 33 - 11) / 28}, {"udp", 4096, 100}, {"udp", 65535, 100}, {"tcp", 0, 100}, {"tcp", 512, 100},
	} {
		q := question("www.example.com", miekg.TypeAAAA)
		if tt.size > 0 {
			q.SetEdns0(tt.size, false)
		}
		var m miekg.Msg
		b := exchangeRaw(t, tt.network, s.addr, q)
		if err := m.Unpack(b); err != nil {
			t.Fatal(err)
		}
		if len(m.Answer) != tt.answers || m.Truncated != (tt.answers < 100) || (m.IsEdns0() != nil) != (tt.size > 0) {
			t.Errorf("%s %d: %d bytes, %d answers, truncated %v, %v", tt.network, tt.size, len(b), len(m.Answer), m.Truncated, m.IsEdns0())
		}
	}
	// Without and with EDNS are two questions; each was truncated by UDP and then asked again by TCP.
	u.mu.Lock()
	defer u.mu.Unlock()
	if diff := cmp.Diff([]string{"udp", "tcp", "udp", "tcp"}, u.via); diff != "" {
		t.Errorf("upstream was asked by: -want +got\n%s", diff)
	}
}

func TestCodesFromUpstream(t *testing.T) {
	noLeaks(t)
	u := newUpstream(t, nil)
	s := serve(t, Config{Servers: to(u)})
	for i, tt := range []struct {
		handler func(miekg.ResponseWriter, *miekg.Msg)
		code    int
		asks    int // for two questions
	}{
		{answers(wwwA), 0, 1},
		{rcode(miekg.RcodeNameError, soa), miekg.RcodeNameError, 1},
		{rcode(miekg.RcodeNameError), miekg.RcodeNameError, 2},
		{rcode(miekg.RcodeSuccess, soa), 0, 1},
		{rcode(miekg.RcodeRefused), miekg.RcodeRefused, 2},
		{rcode(miekg.RcodeServerFailure), miekg.RcodeServerFailure, 2},
	} {
		u.mu.Lock()
		u.handler, u.asked = tt.handler, nil
		u.mu.Unlock()
		for _, name := range []string{"host%d.example.com", "HOST%d.example.COM"} {
			q := question(fmt.Sprintf(name, i), miekg.TypeA)
			if m := exchange(t, "udp", s.addr, q); m.Rcode != tt.code || m.Question[0] != q.Question[0] {
				t.Errorf("%d: %v", i, m)
			}
		}
		if n := u.count(); n != tt.asks {
			t.Errorf("%d: asked upstream %d times, want %d", i, n, tt.asks)
		}
	}
}

// Answers are kept for those who ask the same way: DNSSEC records are not for everybody.
func TestCacheKeepsApart(t *testing.T) {
	noLeaks(t)
	u := newUpstream(t, answers(wwwA))
	s := serve(t, Config{Servers: to(u)})
	ways := []func(q *miekg.Msg){
		func(q *miekg.Msg) {},
		func(q *miekg.Msg) { q.SetEdns0(1232, false) },
		func(q *miekg.Msg) { q.SetEdns0(1232, true) },
		func(q *miekg.Msg) { q.CheckingDisabled = true },
		func(q *miekg.Msg) { q.AuthenticatedData = true },
		func(q *miekg.Msg) { q.RecursionDesired = false },
		func(q *miekg.Msg) { q.Question[0].Qtype = miekg.TypeTXT },
		func(q *miekg.Msg) { q.Question[0].Qclass = miekg.ClassCHAOS },
		func(q *miekg.Msg) { q.Question[0].Name = "example.com." },
	}
	want := len(ways) - 1 // the answer has nothing of type TXT, which is not kept without SOA
	for range 2 {
		for _, way := range ways {
			q := question("www.example.com", miekg.TypeA)
			way(q)
			m := exchange(t, "udp", s.addr, q)
			if (m.IsEdns0() != nil) != (q.IsEdns0() != nil) {
				t.Errorf("%v gives %v", q, m)
			}
		}
		want++
		if n := u.count(); n != want {
			t.Errorf("asked upstream %d times, want %d", n, want)
		}
	}
	for range 2 { // a question with options is its sender's own
		q := question("www.example.com", miekg.TypeA).SetEdns0(1232, false)
		q.IsEdns0().Option = append(q.IsEdns0().Option, &miekg.EDNS0_COOKIE{Code: miekg.EDNS0COOKIE, Cookie: "0102030405060708"})
		exchange(t, "udp", s.addr, q)
		want++
	}
	if n := u.count(); n != want {
		t.Errorf("with cookies: asked upstream %d times, want %d", n, want)
	}
}

// Every question leaves from a port of its own.
func TestSourcePorts(t *testing.T) {
	u := newUpstream(t, answers(wwwA))
	s := serve(t, Config{Servers: to(u)})
	for i := range 20 {
		exchange(t, "udp", s.addr, question(fmt.Sprintf("host%d.example.com", i), miekg.TypeA))
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	ports := make(map[netip.AddrPort]bool)
	for _, p := range u.sources {
		ports[p] = true
	}
	if len(ports) < 15 {
		t.Errorf("%d ports for 20 questions: %v", len(ports), u.sources)
	}
}

// The resolver's sockets are in one namespace, its way out is in another.
func TestAcrossNamespaces(t *testing.T) {
	noLeaks(t)
	u := newUpstream(t, answers(wwwA))
	ns := nettest.NewNS(t)
	var udp *net.UDPConn
	var tcp net.Listener
	inside := func(f func() error) {
		t.Helper()
		if err := ns.Do(f); err != nil {
			t.Fatal(err)
		}
	}
	inside(func() (err error) {
		udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 53})
		return err
	})
	inside(func() (err error) {
		tcp, err = net.Listen("tcp", "127.0.0.1:53")
		return err
	})
	r := New(Config{Sources: []Source{testRecords()}, Servers: to(u), Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := r.Serve(ctx, udp, tcp); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	defer serving.Wait()
	defer cancel()
	for _, network := range []string{"udp", "tcp"} {
		var c net.Conn
		inside(func() (err error) {
			c, err = net.Dial(network, "127.0.0.1:53")
			return err
		})
		defer c.Close()
		for name, want := range map[string]string{"db": "10.200.1.3", "www.example.com": "192.0.2.1"} {
			m, _, err := new(miekg.Client).ExchangeWithConn(question(name, miekg.TypeA), &miekg.Conn{Conn: c})
			if err != nil || len(m.Answer) != 1 || data(m.Answer)[0] != want {
				t.Errorf("%s by %s: %v, %v", name, network, m, err)
			}
		}
	}
}

// plainConn hides what *net.UDPConn has above net.PacketConn, as a user-mode stack's socket lacks it.
type plainConn struct{ net.PacketConn }

func TestServePlainPacketConn(t *testing.T) {
	noLeaks(t)
	u := newUpstream(t, answers(wwwA))
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	r := New(Config{Sources: []Source{testRecords()}, Servers: to(u), Log: slog.New(slog.DiscardHandler)})
	go func() { done <- r.Serve(ctx, plainConn{pc}, nil) }()
	for _, name := range []string{"db", "www.example.com"} {
		if m := exchange(t, "udp", pc.LocalAddr().String(), question(name, miekg.TypeA)); len(m.Answer) != 1 {
			t.Errorf("%s: %v", name, m)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Serve ends at once, whatever is under way, and its sockets are closed.
func TestServeStops(t *testing.T) {
	noLeaks(t)
	asked := make(chan struct{}, 100)
	u := newUpstream(t, func(miekg.ResponseWriter, *miekg.Msg) { asked <- struct{}{} })
	s := serve(t, Config{Servers: to(u)})
	for _, network := range []string{"udp", "tcp"} {
		c, err := miekg.Dial(network, s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.WriteMsg(question("www.example.com", miekg.TypeA)); err != nil {
			t.Fatal(err)
		}
		<-asked
	}
	begin := time.Now()
	s.stop()
	if took := time.Since(begin); took > patience/2 {
		t.Errorf("Serve took %v to return", took)
	}
	if ln, err := net.Listen("tcp", s.addr); err != nil {
		t.Errorf("the listener is still open: %v", err)
	} else {
		ln.Close()
	}
	if pc, err := net.ListenPacket("udp", s.addr); err != nil {
		t.Errorf("the UDP socket is still open: %v", err)
	} else {
		pc.Close()
	}
}

// A socket that is closed by somebody else ends Serve with an error, and the other socket with it.
func TestServeSocketLost(t *testing.T) {
	noLeaks(t)
	for _, lose := range []string{"udp", "tcp"} {
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- New(Config{Log: slog.New(slog.DiscardHandler)}).Serve(t.Context(), pc, ln) }()
		if lose == "udp" {
			pc.Close()
		} else {
			ln.Close()
		}
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: %v, want %v", lose, err, net.ErrClosed)
		}
	}
}

func TestManyClientsAtOnce(t *testing.T) {
	noLeaks(t)
	u := newUpstream(t, func(w miekg.ResponseWriter, q *miekg.Msg) {
		w.WriteMsg(reply(q, q.Question[0].Name+" 100 IN A 192.0.2.1"))
	})
	records := testRecords()
	s := serve(t, Config{Sources: []Source{records}, Servers: to(u)})
	var wg sync.WaitGroup
	for i := range 16 {
		network := []string{"udp", "tcp"}[i%2]
		wg.Go(func() {
			conn, err := miekg.DialTimeout(network, s.addr, testPatience)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			for n := range 100 {
				name := []string{"db.dns.podman.", "www.example.com.", fmt.Sprintf("host%d.example.com.", n)}[n%3]
				m, _, err := (&miekg.Client{Timeout: testPatience}).ExchangeWithConn(question(name, miekg.TypeA), conn)
				if err != nil || len(m.Answer) != 1 {
					t.Errorf("%s by %s: %v, %v", name, network, m, err)
					return
				}
				records.Set(fmt.Sprint(i), Entry{Names: []string{fmt.Sprint("c", i)}, Addrs: addrs(fmt.Sprintf("10.200.1.%d", 100+i))})
			}
		})
	}
	wg.Wait()
}
