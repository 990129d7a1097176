//go:build linux

package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	miekg "github.com/miekg/dns"
)

// bubble is a server in a synctest bubble, with world as upstream.
func bubble(w *world, sources ...Source) *server {
	r := New(Config{Sources: sources, Servers: w.list, Dial: w.dial, Log: slog.New(slog.DiscardHandler)})
	return &server{r: r, open: make(map[flightKey]*flight), clients: make(map[netip.Addr]int)}
}

// Many who ask the same at the same time cost one question, and each gets the answer to its own.
func TestSameQuestionsAreOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{servers: map[string]behaviour{"a": after(time.Second/2, says(wwwA))}}
		s := bubble(w)
		const clients = 50
		replies := make([]*miekg.Msg, clients)
		var questions []*miekg.Msg
		for i := range clients {
			name := []string{"www.example.com", "WWW.Example.com"}[i%2]
			q := question(name, miekg.TypeA)
			questions = append(questions, q)
			parsed := parsed(t, q)
			s.forward(t.Context(), s.r, waiter{parsed, netip.AddrFrom4([4]byte{10, 200, 1, byte(i)}), parsed.limit(overUDP), func(b []byte) {
				replies[i] = new(miekg.Msg)
				if err := replies[i].Unpack(b); err != nil {
					t.Error(err)
				}
			}}, overUDP)
		}
		s.wg.Wait()
		for i, m := range replies {
			if m == nil || m.Id != questions[i].Id || m.Question[0] != questions[i].Question[0] || len(m.Answer) != 1 {
				t.Fatalf("client %d: %v", i, m)
			}
		}
		if asked := w.take(); asked != "udp a" {
			t.Errorf("asked %s, want one question", asked)
		}
		if s.waiting != 0 || len(s.clients) != 0 || len(s.open) != 0 {
			t.Errorf("left: %d waiting, clients %v, %d flights", s.waiting, s.clients, len(s.open))
		}
	})
}

// A client with too many questions under way is told so at once, and others are not concerned.
func TestWaitingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{servers: map[string]behaviour{"a": after(time.Second/2, says())}}
		s := bubble(w)
		codes := make(map[string]int)
		var mu sync.Mutex
		n := 0
		ask := func(client byte) {
			n++
			q := parsed(t, question(fmt.Sprintf("host%d.example.com", n), miekg.TypeA))
			s.forward(t.Context(), s.r, waiter{q, netip.AddrFrom4([4]byte{10, 200, 1, client}), q.limit(overUDP), func(b []byte) {
				mu.Lock()
				defer mu.Unlock()
				codes[fmt.Sprint(client, " ", miekg.RcodeToString[rcodeOf(b)])]++
			}}, overUDP)
		}
		for range maxWaitingClient + 10 {
			ask(1)
		}
		if codes["1 SERVFAIL"] != 10 {
			t.Errorf("before any answer: %v, want 10 of client 1 refused", codes)
		}
		for client := byte(2); s.waiting < maxWaiting; client++ {
			for range min(maxWaitingClient, maxWaiting-s.waiting) {
				ask(client)
			}
		}
		ask(100)
		s.wg.Wait()
		if codes["1 NOERROR"] != maxWaitingClient || codes["2 NOERROR"] != maxWaitingClient || codes["100 SERVFAIL"] != 1 || codes["2 SERVFAIL"] != 0 {
			t.Errorf("codes: %v", codes)
		}
		ask(1)
		s.wg.Wait()
		if codes["1 NOERROR"] != maxWaitingClient+1 {
			t.Errorf("afterwards: %v", codes)
		}
		w.wg.Wait()
	})
}

// stream is a client on a TCP connection to s.
func stream(t *testing.T, s *server) *miekg.Conn {
	here, there := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	s.wg.Go(func() { s.serveConn(ctx, there, netip.MustParseAddr("10.200.1.2")) })
	t.Cleanup(func() { cancel(); here.Close(); s.wg.Wait() })
	return &miekg.Conn{Conn: here}
}

func TestStreamIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{servers: map[string]behaviour{"a": saysNothing}}
		s := bubble(w, testRecords())
		c := stream(t, s)
		for _, wait := range []time.Duration{0, idle - 1} {
			time.Sleep(wait)
			if err := c.WriteMsg(question("db", miekg.TypeA)); err != nil {
				t.Fatal(err)
			}
			if m, err := c.ReadMsg(); err != nil || len(m.Answer) != 1 {
				t.Fatal(m, err)
			}
		}
		begin := time.Now()
		if _, err := c.ReadMsg(); err != io.EOF || time.Since(begin) != idle {
			t.Errorf("closed after %v: %v, want %v", time.Since(begin), err, idle)
		}

		// Half a message is idle as well.
		c = stream(t, s)
		if _, err := c.Conn.Write([]byte{0, 100, 1}); err != nil {
			t.Fatal(err)
		}
		begin = time.Now()
		if _, err := c.ReadMsg(); err != io.EOF || time.Since(begin) != idle {
			t.Errorf("half a message: closed after %v: %v, want %v", time.Since(begin), err, idle)
		}
	})
}

// What is known here does not wait for what upstream is asked.
func TestStreamPipelining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{servers: map[string]behaviour{"a": after(time.Second/2, says(wwwA))}}
		s := bubble(w, testRecords())
		c := stream(t, s)
		qs := []*miekg.Msg{question("www.example.com", miekg.TypeA), question("db", miekg.TypeA), question("web", miekg.TypeA)}
		for i, q := range qs {
			q.Id = uint16(i)
			if err := c.WriteMsg(q); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range []uint16{1, 2, 0} {
			if m, err := c.ReadMsg(); err != nil || m.Id != want || len(m.Answer) != 1 {
				t.Errorf("%v (%v), want the answer to %d", m, err, want)
			}
		}
	})
}

// A client that does not read holds up nobody but itself, and not for long.
func TestStreamThatIsNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := bubble(&world{}, testRecords())
		c := stream(t, s)
		msg, err := question("front", miekg.TypeANY).SetEdns0(1232, false).Pack()
		if err != nil {
			t.Fatal(err)
		}
		framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)
		begin, n := time.Now(), 0
		for ; err == nil; n++ {
			_, err = c.Conn.Write(framed)
		}
		if took := time.Since(begin); took > 2*idle || n > 4*outboxFull/len(msg) {
			t.Errorf("%d questions were taken in %v: %v", n, took, err)
		}
	})
}

// A client that has said all it has to say still gets its answers.
func TestStreamHalfClosed(t *testing.T) {
	noLeaks(t)
	release := make(chan struct{})
	u := newUpstream(t, func(w miekg.ResponseWriter, q *miekg.Msg) {
		<-release
		w.WriteMsg(reply(q, wwwA))
	})
	s := serve(t, Config{Servers: to(u)})
	c, err := miekg.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.WriteMsg(question("www.example.com", miekg.TypeA)); err != nil {
		t.Fatal(err)
	}
	if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	close(release)
	if m, err := c.ReadMsg(); err != nil || len(m.Answer) != 1 {
		t.Errorf("%v, %v", m, err)
	}
	if _, err := c.ReadMsg(); err != io.EOF {
		t.Errorf("then %v, want %v", err, io.EOF)
	}
}

func TestStreamsPerClient(t *testing.T) {
	noLeaks(t)
	s := serve(t, Config{Sources: []Source{testRecords()}})
	ask := func(c *miekg.Conn) error {
		c.SetDeadline(time.Now().Add(testPatience))
		if err := c.WriteMsg(question("db", miekg.TypeA)); err != nil {
			return err
		}
		_, err := c.ReadMsg()
		return err
	}
	var conns []*miekg.Conn
	for range maxConnsClient {
		c, err := miekg.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := ask(c); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	one := func(from string) error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return ask(&miekg.Conn{Conn: c})
	}
	if err := one("127.0.0.1"); err == nil {
		t.Errorf("connection %d of one client is served", maxConnsClient+1)
	}
	if err := one("127.0.0.2"); err != nil {
		t.Errorf("another client: %v", err)
	}
	conns[0].Close()
	for deadline := time.Now().Add(testPatience); one("127.0.0.1") != nil; {
		if time.Now().After(deadline) {
			t.Fatal("the place of a closed connection is not free again")
		}
	}
	for _, c := range conns[1:] {
		if err := ask(c); err != nil {
			t.Errorf("an old connection: %v", err)
		}
	}
}
