//go:build linux

package dns

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	miekg "github.com/miekg/dns"
)

// world is upstream servers without a network, so that time can be a test's own. They are called a, b, c and so on.
type world struct {
	servers map[string]behaviour // nil: it cannot be reached

	wg    sync.WaitGroup // connections
	mu    sync.Mutex
	asked []string // as "network server"
}

// behaviour is what a server does with a question.
type behaviour func(network string, q *miekg.Msg, answer func(*miekg.Msg))

var errUnreachable = errors.New("unreachable")

// list is the addresses of the servers, the preferred one first.
func (w *world) list() []netip.AddrPort {
	var list []netip.AddrPort
	for _, name := range slices.Sorted(maps.Keys(w.servers)) {
		list = append(list, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, name[0]}), 53))
	}
	return list
}

func (w *world) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	name := string(host.Addr().AsSlice()[3:])
	w.mu.Lock()
	w.asked = append(w.asked, network+" "+name)
	w.mu.Unlock()
	if w.servers[name] == nil {
		return nil, errUnreachable
	}
	here, there := net.Pipe()
	serve := w.servers[name]
	w.wg.Go(func() { serveWorld(there, network, serve) })
	return here, nil
}

// serveWorld answers one question.
func serveWorld(conn net.Conn, network string, serve behaviour) {
	defer conn.Close()
	buf := make([]byte, miekg.MaxMsgSize)
	n, err := conn.Read(buf)
	if err != nil {
		return
	}
	ask := buf[:n]
	if network == "tcp" {
		ask = ask[2:]
	}
	q := new(miekg.Msg)
	if err := q.Unpack(ask); err != nil {
		panic(err)
	}
	serve(network, q, func(m *miekg.Msg) {
		b, err := m.Pack()
		if err != nil {
			panic(err)
		}
		if network == "tcp" {
			b = append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
		}
		conn.Write(b)
	})
	io.Copy(io.Discard, conn) // until the other side has had enough
}

// take returns what was asked since the last time, when all of it is over.
func (w *world) take() string {
	w.wg.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	s := strings.Join(w.asked, ", ")
	w.asked = nil
	return s
}

func after(d time.Duration, b behaviour) behaviour {
	return func(network string, q *miekg.Msg, answer func(*miekg.Msg)) {
		time.Sleep(d)
		b(network, q, answer)
	}
}

func says(rrs ...string) behaviour {
	return func(_ string, q *miekg.Msg, answer func(*miekg.Msg)) { answer(reply(q, rrs...)) }
}

func fails(code int) behaviour {
	return func(_ string, q *miekg.Msg, answer func(*miekg.Msg)) {
		m := reply(q)
		m.Rcode = code
		answer(m)
	}
}

// bare fails as a server does that cannot read the question.
func bare(code int) behaviour {
	return func(_ string, q *miekg.Msg, answer func(*miekg.Msg)) {
		answer(&miekg.Msg{MsgHdr: miekg.MsgHdr{Id: q.Id, Response: true, Rcode: code}})
	}
}

func saysNothing(string, *miekg.Msg, func(*miekg.Msg)) {}

// lossy does not get the first question.
func lossy(b behaviour) behaviour {
	var asked atomic.Int32
	return func(network string, q *miekg.Msg, answer func(*miekg.Msg)) {
		if asked.Add(1) > 1 {
			b(network, q, answer)
		}
	}
}

// split is one behaviour by UDP and another one by TCP.
func split(udp, tcp behaviour) behaviour {
	return func(network string, q *miekg.Msg, answer func(*miekg.Msg)) {
		map[string]behaviour{"udp": udp, "tcp": tcp}[network](network, q, answer)
	}
}

func truncated(_ string, q *miekg.Msg, answer func(*miekg.Msg)) {
	m := reply(q, wwwA2)
	m.Truncated = true
	answer(m)
}

// spoofed is what a client sees when somebody else tries to be faster than the server.
func spoofed(right behaviour) behaviour {
	return func(network string, q *miekg.Msg, answer func(*miekg.Msg)) {
		for _, change := range []func(guess *miekg.Msg){
			func(guess *miekg.Msg) { guess.Id++ },
			func(guess *miekg.Msg) { guess.Question[0].Name = "www.example.org." },
			func(guess *miekg.Msg) { guess.Question[0].Qtype = miekg.TypeAAAA },
			func(guess *miekg.Msg) { guess.Question[0].Qclass = miekg.ClassCHAOS },
			func(guess *miekg.Msg) { guess.Question = nil },
			func(guess *miekg.Msg) { guess.Response = false },
			func(guess *miekg.Msg) { guess.Opcode = miekg.OpcodeNotify },
		} {
			guess := reply(q.Copy(), wwwA2)
			change(guess)
			answer(guess)
		}
		right(network, q, answer)
	}
}

// outcomeText is an answer in short.
func outcomeText(msg []byte, err error) string {
	if err != nil {
		return "none"
	}
	m := new(miekg.Msg)
	if err := m.Unpack(msg); err != nil {
		return err.Error()
	}
	if m.Truncated {
		return "truncated"
	}
	return strings.TrimSpace(miekg.RcodeToString[m.Rcode] + " " + strings.Join(data(m.Answer), " "))
}

func parsed(t testing.TB, m *miekg.Msg) *query {
	t.Helper()
	msg, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	q := new(query)
	if rcode, ok := q.parse(msg); !ok || rcode != 0 {
		t.Fatalf("%v: code %d, %v", m.Question, rcode, ok)
	}
	return q
}

func TestFailover(t *testing.T) {
	good, other := says(wwwA), says(wwwA2)
	servfail := fails(miekg.RcodeServerFailure)
	type servers = map[string]behaviour
	for _, tt := range []struct {
		name    string
		by      transport
		servers servers
		want    string // the answer and how long it took
		asked   string
	}{
		{"the first answers", overUDP, servers{"a": good, "b": other}, "NOERROR 192.0.2.1 0s", "udp a"},
		{"the first cannot be reached", overUDP, servers{"a": nil, "b": good}, "NOERROR 192.0.2.1 0s", "udp a, udp b"},
		{"the first is silent", overUDP, servers{"a": saysNothing, "b": good}, "NOERROR 192.0.2.1 1s", "udp a, udp b"},
		{"two are silent", overUDP, servers{"a": saysNothing, "b": saysNothing, "c": good},
			"NOERROR 192.0.2.1 2s", "udp a, udp b, udp c"},
		{"the first is slow, the second slower", overUDP, servers{"a": after(1500*time.Millisecond, good), "b": after(time.Second, other)},
			"NOERROR 192.0.2.1 1.5s", "udp a, udp b"},
		{"a datagram is lost", overUDP, servers{"a": lossy(good)}, "NOERROR 192.0.2.1 1s", "udp a, udp a"},
		{"no datagram passes", overUDP, servers{"a": split(saysNothing, good)}, "NOERROR 192.0.2.1 2s", "udp a, udp a, tcp a"},
		{"a failure of the first", overUDP, servers{"a": servfail, "b": good}, "NOERROR 192.0.2.1 0s", "udp a, udp b"},
		{"a failure of all", overUDP, servers{"a": servfail, "b": servfail}, "SERVFAIL 0s", "udp a, udp b"},
		{"a failure, then silence", overUDP, servers{"a": servfail, "b": saysNothing}, "SERVFAIL 1s", "udp a, udp b"},
		{"refused is an answer", overUDP, servers{"a": fails(miekg.RcodeRefused), "b": good}, "REFUSED 0s", "udp a"},
		{"so is no such name", overUDP, servers{"a": fails(miekg.RcodeNameError), "b": good}, "NXDOMAIN 0s", "udp a"},
		{"and a bare header", overUDP, servers{"a": bare(miekg.RcodeNotImplemented), "b": good}, "NOTIMP 0s", "udp a"},
		{"all are silent", overUDP, servers{"a": saysNothing, "b": saysNothing}, "none 4.5s", "udp a, udp b, udp a, udp b, tcp a"},
		{"none can be reached", overUDP, servers{"a": nil, "b": nil}, "none 0s", "udp a, udp b, udp a, udp b, tcp a, tcp b"},
		{"there is none", overUDP, nil, "none 0s", ""},
		{"truncated", overUDP, servers{"a": split(truncated, good)}, "NOERROR 192.0.2.1 0s", "udp a, tcp a"},
		{"truncated everywhere", overUDP, servers{"a": truncated}, "truncated 0s", "udp a, tcp a"},
		{"by TCP", overTCP, servers{"a": split(truncated, good)}, "NOERROR 192.0.2.1 0s", "tcp a"},
		{"by TCP, which the server lacks", overTCP, servers{"a": split(good, saysNothing)}, "NOERROR 192.0.2.1 1s", "tcp a, udp a"},
		{"by TCP, truncated", overTCP, servers{"a": truncated, "b": good}, "NOERROR 192.0.2.1 0s", "tcp a, tcp b"},
		{"somebody guesses", overUDP, servers{"a": spoofed(good)}, "NOERROR 192.0.2.1 0s", "udp a"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{servers: tt.servers}
				f := newForwarder(w.list, w.dial)
				start := time.Now()
				got := outcomeText(f.exchange(t.Context(), parsed(t, question("www.example.com", miekg.TypeA)), tt.by))
				if got += " " + time.Since(start).String(); got != tt.want {
					t.Errorf("%s, want %s", got, tt.want)
				}
				if got := w.take(); got != tt.asked {
					t.Errorf("asked %s, want %s", got, tt.asked)
				}
			})
		})
	}
}

// A server that did not answer is asked last for a while, and first again once it has answered or time has passed.
func TestFailoverIsRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{servers: map[string]behaviour{"a": saysNothing, "b": says(wwwA)}}
		f := newForwarder(w.list, w.dial)
		ask := func(want, asked string) {
			t.Helper()
			got := outcomeText(f.exchange(t.Context(), parsed(t, question("www.example.com", miekg.TypeA)), overUDP))
			if at := w.take(); got != want || at != asked {
				t.Errorf("%s from %s, want %s from %s", got, at, want, asked)
			}
		}
		ask("NOERROR 192.0.2.1", "udp a, udp b")
		ask("NOERROR 192.0.2.1", "udp b")
		time.Sleep(penalty)
		ask("NOERROR 192.0.2.1", "udp a, udp b")
		w.servers["a"], w.servers["b"] = says(wwwA2), nil
		ask("NOERROR 192.0.2.2", "udp b, udp a")
		ask("NOERROR 192.0.2.2", "udp a")
		w.servers["a"] = nil
		ask("none", "udp a, udp b, udp a, udp b, tcp a, tcp b")
		ask("none", "udp a, udp b, udp a, udp b, tcp a, tcp b") // all bad: the order is the host's
		time.Sleep(penalty)
		w.servers["a"], w.servers["b"] = fails(miekg.RcodeServerFailure), nil
		ask("SERVFAIL", "udp a, udp b, udp b, tcp b")
		w.servers["a"], w.servers["b"] = saysNothing, says(wwwA)
		ask("NOERROR 192.0.2.1", "udp a, udp b")
		ask("NOERROR 192.0.2.1", "udp b") // which answered meanwhile, unlike a
		time.Sleep(penalty)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second/2, cancel)
		if _, err := f.exchange(ctx, parsed(t, question("www.example.com", miekg.TypeA)), overUDP); err == nil {
			t.Error("an answer from nobody")
		}
		if len(f.bad) != 0 {
			t.Errorf("blamed for what the resolver broke off: %v", f.bad)
		}
	})
}

// What goes out is what the client sent, but for the ID and the size of datagrams, which are between us and the server.
func TestQuestionsPassUntouched(t *testing.T) {
	q := question("WwW.eXample.com", 65280).SetEdns0(4096, true)
	q.Question[0].Qclass = miekg.ClassCHAOS
	q.CheckingDisabled, q.AuthenticatedData = true, true
	q.IsEdns0().Option = append(q.IsEdns0().Option, &miekg.EDNS0_LOCAL{Code: 65001, Data: []byte("x")})
	for _, by := range []transport{overUDP, overTCP} {
		synctest.Test(t, func(t *testing.T) {
			var got []*miekg.Msg
			w := &world{servers: map[string]behaviour{"a": func(_ string, q *miekg.Msg, answer func(*miekg.Msg)) {
				got = append(got, q)
				answer(reply(q))
			}}}
			defer w.wg.Wait()
			f := newForwarder(w.list, w.dial)
			ids := make(map[uint16]bool)
			for range 20 {
				if _, err := f.exchange(t.Context(), parsed(t, q), by); err != nil {
					t.Fatal(err)
				}
				last := got[len(got)-1]
				ids[last.Id] = true
				want := q.Copy()
				want.Id = last.Id
				if by == overUDP {
					want.IsEdns0().SetUDPSize(udpSize)
				}
				if diff := cmp.Diff(want.String(), last.String()); diff != "" {
					t.Fatalf("-want +got\n%s", diff)
				}
			}
			if len(ids) < 18 { // three equal ones among 20 of 65536: one run in 10^8
				t.Errorf("only %d different IDs", len(ids))
			}
		})
	}
}
