//go:build linux

package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
	"go.uber.org/goleak"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// testPatience is how long a test waits for an answer: longer than the resolver waits for upstream.
const testPatience = 4 * patience

func addrs(list ...string) []netip.Addr {
	var as []netip.Addr
	for _, a := range list {
		as = append(as, netip.MustParseAddr(a))
	}
	return as
}

// upstream is a pretend resolver on the Internet. It answers by handler, over UDP and TCP on one port.
type upstream struct {
	addr netip.AddrPort

	mu      sync.Mutex
	handler func(w miekg.ResponseWriter, q *miekg.Msg)
	asked   []*miekg.Msg
	via     []string // the networks that the questions came by
	sources []netip.AddrPort
}

func newUpstream(t testing.TB, handler func(miekg.ResponseWriter, *miekg.Msg)) *upstream {
	t.Helper()
	u := &upstream{handler: handler}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u.addr = ln.Addr().(*net.TCPAddr).AddrPort()
	pc, err := net.ListenPacket("udp", u.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	for _, s := range []*miekg.Server{{PacketConn: pc, Handler: u}, {Listener: ln, Handler: u}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		wg.Go(func() { s.ActivateAndServe() })
		<-started
		t.Cleanup(func() { s.Shutdown() })
	}
	return u
}

func (u *upstream) ServeDNS(w miekg.ResponseWriter, q *miekg.Msg) {
	u.mu.Lock()
	u.asked = append(u.asked, q.Copy())
	u.via = append(u.via, w.RemoteAddr().Network())
	u.sources = append(u.sources, addrPort(w.RemoteAddr()))
	handler := u.handler
	u.mu.Unlock()
	handler(w, q)
}

// count is how many questions came.
func (u *upstream) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.asked)
}

// answers makes a handler that answers everything with the records given.
func answers(rrs ...string) func(miekg.ResponseWriter, *miekg.Msg) {
	return func(w miekg.ResponseWriter, q *miekg.Msg) { w.WriteMsg(reply(q, rrs...)) }
}

func reply(q *miekg.Msg, rrs ...string) *miekg.Msg {
	m := new(miekg.Msg).SetReply(q)
	m.RecursionAvailable = true
	for _, s := range rrs {
		m.Answer = append(m.Answer, rr(s))
	}
	if opt := q.IsEdns0(); opt != nil {
		m.SetEdns0(1400, opt.Do())
	}
	return m
}

func rcode(code int, authority ...string) func(miekg.ResponseWriter, *miekg.Msg) {
	return func(w miekg.ResponseWriter, q *miekg.Msg) {
		m := reply(q)
		m.Rcode = code
		for _, s := range authority {
			m.Ns = append(m.Ns, rr(s))
		}
		w.WriteMsg(m)
	}
}

func rr(s string) miekg.RR {
	r, err := miekg.NewRR(s)
	if err != nil {
		panic(err)
	}
	return r
}

// sockets are those of a resolver under test.
type sockets struct {
	addr string // of both
	stop func() // waits until Serve has returned
}

// serve runs a resolver on loopback until the test ends.
func serve(t testing.TB, c Config) sockets {
	t.Helper()
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return serveResolver(t, New(c))
}

func serveResolver(t testing.TB, r *Resolver) sockets {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx, pc, ln) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("Serve: %v, want nil", err)
				}
			case <-time.After(testPatience):
				t.Error("Serve does not return")
			}
		})
	}
	t.Cleanup(stop)
	return sockets{ln.Addr().String(), stop}
}

// noLeaks fails the test if goroutines, links or files are left when it ends.
func noLeaks(t testing.TB) {
	t.Helper()
	nettest.NoLeaks(t)
	t.Cleanup(func() { goleak.VerifyNone(t) })
}

// to makes the list of servers a function.
func to(us ...*upstream) func() []netip.AddrPort {
	var list []netip.AddrPort
	for _, u := range us {
		list = append(list, u.addr)
	}
	return func() []netip.AddrPort { return list }
}

func question(name string, qtype uint16) *miekg.Msg {
	return new(miekg.Msg).SetQuestion(miekg.Fqdn(name), qtype)
}

func exchange(t testing.TB, network, server string, q *miekg.Msg) *miekg.Msg {
	t.Helper()
	c := miekg.Client{Net: network, Timeout: testPatience, UDPSize: miekg.MaxMsgSize}
	m, _, err := c.Exchange(q, server)
	if err != nil {
		t.Fatalf("ask %v by %s: %v", q.Question, network, err)
	}
	return m
}

// data is the records of a section without their headers, sorted.
func data(rrs []miekg.RR) []string {
	var ds []string
	for _, r := range rrs {
		ds = append(ds, r.String()[len(r.Header().String()):])
	}
	slices.Sort(ds)
	return ds
}
