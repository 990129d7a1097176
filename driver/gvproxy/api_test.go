package gvproxy

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
)

// call is one request and the answer that gvproxy v0.8.9 gave to it, unless its comment says otherwise.
type call struct {
	method, path, body string
	status             int
	want               string
}

const (
	exposePath   = "/services/forwarder/expose"
	unexposePath = "/services/forwarder/unexpose"
	allPath      = "/services/forwarder/all"
	zonesPath    = "/services/dns/all"
	addPath      = "/services/dns/add"
)

// run makes the calls in their order, from the address given.
func run(t *testing.T, h http.Handler, from string, calls []call) {
	t.Helper()
	for _, c := range calls {
		req := httptest.NewRequestWithContext(t.Context(), c.method, c.path, strings.NewReader(c.body))
		req.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		if w.Code != c.status || w.Body.String() != c.want {
			t.Errorf("%s %s %.200s:\n got %d %q\nwant %d %q", c.method, c.path, c.body, w.Code, w.Body, c.status, c.want)
		}
	}
}

func TestForwarder(t *testing.T) {
	const (
		ssh    = "ssh-tunnel://u@192.168.127.2/run/x?key=/k"
		socket = `{"protocol":"unix","local":"/tmp/u.sock","remote":"`
	)
	g := newFake(forward(t, TCP, "127.0.0.1:2222", "192.168.127.2:22"))
	run(t, Services(g, slog.New(slog.DiscardHandler)), "@", []call{
		{"GET", allPath, ``, 200, `[{"local":"127.0.0.1:2222","remote":"192.168.127.2:22","protocol":"tcp"}]` + "\n"},
		{"GET", exposePath, ``, 400, "post only\n"},
		{"PUT", exposePath, `{}`, 400, "post only\n"},
		{"POST", exposePath, ``, 400, "EOF\n"},
		{"POST", exposePath, `{`, 400, "unexpected EOF\n"},
		{"POST", exposePath, `{"local":":6443","remote":"192.168.127.2:6443"}`, 200, ""},
		// v0.8.9 does not say which.
		{"POST", exposePath, `{"local":":6443","remote":"192.168.127.2:1"}`, 500, "proxy already running for tcp on :6443\n"},
		{"POST", exposePath, `{"local":":6443","remote":"192.168.127.2:6443","protocol":"udp"} behind`, 200, ""},
		{"POST", exposePath, `{"LOCAL":"","remote":"192.168.127.2:80","protocol":"tcp","more":1}`, 200, ""},
		{"POST", exposePath, `{"local":":1","remote":":6443"}`, 400, "address @: missing port in address\n"},
		{"POST", exposePath, `{"local":":1","remote":"192.168.127.2"}`, 400, "address 192.168.127.2: missing port in address\n"},
		{"POST", exposePath, `{"local":":1","remote":"192.168.127.2:99999"}`, 500, `strconv.ParseUint: parsing "99999": value out of range` + "\n"},
		{"POST", exposePath, `{"local":":1","remote":"192.168.127.2:x"}`, 500, `strconv.ParseUint: parsing "x": invalid syntax` + "\n"},
		{"POST", exposePath, `{"local":":1","remote":"192.168.127.2:80","protocol":"sctp"}`, 500, "unknown protocol sctp\n"},
		// v0.8.9 panics.
		{"POST", exposePath, `{"local":":1","remote":"name:80"}`, 500, "invalid remote addr\n"},
		// v0.8.9 knows IPv4 only.
		{"POST", exposePath, `{"local":":66","remote":"[fd00::2]:80"}`, 200, ""},

		{"POST", exposePath, socket + `tcp://192.168.127.2:80"}`, 200, ""},
		{"POST", exposePath, socket + `tcp://192.168.127.2"}`, 500, `strconv.ParseUint: parsing "": invalid syntax` + "\n"},
		{"POST", exposePath, socket + `http://192.168.127.2"}`, 500, "remote protocol for unix forwarder is not implemented: http\n"},
		{"POST", exposePath, socket + `%zz"}`, 500, `failed to parse remote uri :%zz : parse "%zz": invalid URL escape "%zz"` + "\n"},
		{"POST", exposePath, socket + `ssh-tunnel://u@192.168.127.2"}`, 500, "key not provided for unix-ssh connection\n"},
		{"POST", exposePath, socket + `ssh-tunnel://u@192.168.127.2?key=/k"}`, 500, "remote uri must contain a path to a socket file\n"},
		{"POST", exposePath, `{"protocol":"npipe","local":"npipe:////./pipe/x","remote":"` + ssh + `"}`, 200, ""},

		{"GET", unexposePath, ``, 400, "post only\n"},
		{"POST", unexposePath, `{"local":":1","protocol":"weird"}`, 500, "proxy not found\n"},
		{"POST", unexposePath, `{"local":":6443"}`, 200, ""},
		{"POST", unexposePath, `{"local":":6443"}`, 500, "proxy not found\n"},
		{"POST", allPath, ``, 200, `[{"local":"","remote":"192.168.127.2:80","protocol":"tcp"},` +
			`{"local":"/tmp/u.sock","remote":"tcp://192.168.127.2:80","protocol":"unix"},` +
			`{"local":"127.0.0.1:2222","remote":"192.168.127.2:22","protocol":"tcp"},` +
			`{"local":":6443","remote":"192.168.127.2:6443","protocol":"udp"},` +
			`{"local":":66","remote":"[fd00::2]:80","protocol":"tcp"},` +
			`{"local":"npipe:////./pipe/x","remote":"` + ssh + `","protocol":"npipe"}]` + "\n"},
	})

	run(t, Services(newFake(), slog.New(slog.DiscardHandler)), "@", []call{{"GET", allPath, ``, 200, "[]\n"}})

	g.broken = errors.New("listen tcp 0.0.0.0:1: bind: address already in use")
	run(t, Services(g, slog.New(slog.DiscardHandler)), "@", []call{
		{"POST", exposePath, `{"local":"0.0.0.0:1","remote":"192.168.127.2:1"}`, 500, g.broken.Error() + "\n"},
	})
}

// Forwards are listed by local address, and those of one address by protocol.
func TestForwardOrder(t *testing.T) {
	g := newFake(
		forward(t, UDP, ":2", "192.168.127.2:2"), forward(t, TCP, ":2", "192.168.127.2:2"),
		forward(t, TCP, ":10", "192.168.127.2:1"), forward(t, TCP, "127.0.0.1:2", "192.168.127.2:2"),
	)
	const to = `","remote":"192.168.127.2:`
	want := `[{"local":"127.0.0.1:2` + to + `2","protocol":"tcp"},{"local":":10` + to + `1","protocol":"tcp"},` +
		`{"local":":2` + to + `2","protocol":"tcp"},{"local":":2` + to + `2","protocol":"udp"}]` + "\n"
	run(t, Services(g, slog.New(slog.DiscardHandler)), "@", []call{{"GET", allPath, ``, 200, want}})
}

func TestZones(t *testing.T) {
	g := newFake()
	g.zones = []Zone{{Name: "containers.internal.", Records: []Record{
		{Name: "gateway", Addr: netip.MustParseAddr("192.168.127.1")},
		{Name: "host", Addr: netip.MustParseAddr("192.168.127.254")},
	}}}
	const own = `{"Name":"containers.internal.","Records":[{"Name":"gateway","IP":"192.168.127.1"},{"Name":"host","IP":"192.168.127.254"}],"DefaultIP":""}`
	run(t, Services(g, slog.New(slog.DiscardHandler)), "@", []call{
		{"GET", zonesPath, ``, 200, `[` + own + "]\n"},
		{"GET", addPath, ``, 400, "post only\n"},
		{"POST", addPath, `{"Name":"crc.testing.","Records":[{"Name":"a","IP":"1.2.3.4"},{"Regexp":"^b.*"}],"DefaultIP":"4.3.2.1"}`, 200, ""},
		{"POST", addPath, `{"Name":"crc.testing.","Records":[{"Name":"c","IP":"::1"}]}`, 200, ""},
		{"POST", addPath, `{"Name":"v6.","Records":null,"DefaultIP":"::ffff:1.2.3.4"}`, 200, ""},
		{"POST", addPath, `{"Name":"v7.","Records":[]}`, 200, ""},
		{"POST", addPath, `{"Name":"x.","Records":[{"Name":"a","IP":"nope"}]}`, 400, "invalid IP address: nope\n"},
		{"POST", addPath, `{"Name":"x.","Records":[{"Regexp":"("}]}`, 400, "error parsing regexp: missing closing ): `(`\n"},
		{"POST", addPath, `{}`, 200, ""},
		{"GET", zonesPath, ``, 200, `[` + own +
			`,{"Name":"crc.testing.","Records":[{"Name":"c","IP":"::1"},{"Name":"a","IP":"1.2.3.4"},{"Name":"","IP":"","Regexp":"^b.*"}],"DefaultIP":""}` +
			`,{"Name":"v6.","Records":null,"DefaultIP":"1.2.3.4"},{"Name":"v7.","Records":[],"DefaultIP":""},{"Name":"","Records":null,"DefaultIP":""}]` + "\n"},
	})
	run(t, Services(newFake(), slog.New(slog.DiscardHandler)), "@", []call{{"GET", zonesPath, ``, 200, "null\n"}})
}

// Merge must not write into what it was given: the gateway's resolver may be reading it.
func TestMergeLeavesItsArguments(t *testing.T) {
	few := make([]Record, 1, 4)
	few[0].Name = "new"
	old := []Zone{{Name: "z.", Records: []Record{{Name: "old"}}}}
	merged := Merge(old, Zone{Name: "z.", Records: few})
	if got := len(merged[0].Records); got != 2 || merged[0].Records[0].Name != "new" {
		t.Errorf("records %v", merged[0].Records)
	}
	if len(old[0].Records) != 1 || few[:2][1].Name != "" {
		t.Errorf("changed: %v, %v", old, few[:2])
	}
}

type tally uint64

func (c *tally) Value() uint64 { return uint64(*c) }

type tcpStats struct{ Retransmits, Resets *tally }

// counters are of netstack's shape: structs of structs, some of them embedded, and pointers to counters.
type counters struct {
	Dropped *tally
	TCP     struct {
		tcpStats // not exported: left out
		Sent     *tally
		V4       TCPStats
	}
	hidden *tally
	Name   string // no counter
}

// TCPStats is exported, as an embedded struct has to be to be shown.
type TCPStats struct{ Open *tally }

func TestTables(t *testing.T) {
	one := tally(1)
	stats := counters{Dropped: &one, hidden: &one, Name: "x"}
	stats.TCP.Sent, stats.TCP.Resets, stats.TCP.V4.Open = &one, &one, &one
	g := newFake()
	g.leases = map[netip.Addr]MAC{
		netip.MustParseAddr("192.168.127.10"): {0x5a, 0x94, 0xef, 0xe4, 0x0c, 0x01},
		netip.MustParseAddr("192.168.127.2"):  {0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee},
		netip.MustParseAddr("192.168.127.1"):  {0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd},
	}
	g.cam = map[MAC]int{{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}: 3, {2}: 0}
	g.stats = Stats{BytesSent: 7, BytesReceived: 9, Counters: &stats}
	const leases = `{"192.168.127.1":"5a:94:ef:e4:0c:dd","192.168.127.10":"5a:94:ef:e4:0c:01","192.168.127.2":"5a:94:ef:e4:0c:ee"}` + "\n"
	const counted = `{"BytesReceived":9,"BytesSent":7,"Dropped":1,"TCP":{"Sent":1,"V4":{"Open":1}}}` + "\n"
	run(t, Full(g, slog.New(slog.DiscardHandler)), "@", []call{
		{"GET", "/leases", ``, 200, leases},
		{"OPTIONS", "/services/dhcp/leases", ``, 200, leases},
		{"PUT", "/cam", ``, 200, `{"02:00:00:00:00:00":0,"5a:94:ef:e4:0c:ee":3}` + "\n"},
		{"GET", "/stats", ``, 200, counted},
	})
	run(t, Full(newFake(), slog.New(slog.DiscardHandler)), "@", []call{
		{"GET", "/leases", ``, 200, "{}\n"},
		{"GET", "/cam", ``, 200, "{}\n"},
		{"GET", "/stats", ``, 200, `{"BytesReceived":0,"BytesSent":0}` + "\n"},
	})
}

// What each of the three APIs has. What one lacks is not found, whatever the method.
func TestPaths(t *testing.T) {
	const missing = "404 page not found\n"
	g := newFake()
	log := slog.New(slog.DiscardHandler)
	for _, path := range []string{"/", "/nope", "/services/forwarder/all/", "/services/forwarder/", "/services/dns/", "/debug/pprof/"} {
		run(t, Full(g, log), "@", []call{{"GET", path, ``, 404, missing}, {"POST", path, ``, 404, missing}})
	}
	run(t, Services(g, log), "@", []call{{"POST", "/connect", ``, 404, missing}})
	for _, path := range []string{"/connect", "/tunnel?ip=192.168.127.2&port=22", zonesPath, addPath, "/leases", "/services/dhcp/leases", "/cam", "/stats"} {
		run(t, Inside(g), "192.168.127.2:5000", []call{{"GET", path, `{}`, 404, missing}, {"POST", path, `{}`, 404, missing}})
	}
	run(t, Full(g, log), "@", []call{
		{"GET", "/tunnel", ``, 500, "ip is mandatory\n"},
		{"GET", "/tunnel?ip=192.168.127.2", ``, 500, `strconv.ParseUint: parsing "": invalid syntax` + "\n"},
		{"GET", "/tunnel?ip=192.168.127.2&port=99999", ``, 500, `strconv.ParseUint: parsing "99999": value out of range` + "\n"},
		// v0.8.9 says OK and panics.
		{"GET", "/tunnel?ip=nope&port=1", ``, 500, "invalid remote addr\n"},
	})
	w := httptest.NewRecorder()
	Debug(Full(g, log)).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/debug/pprof/cmdline", nil))
	if w.Code != 200 || w.Body.Len() == 0 {
		t.Errorf("profiler: %d %q", w.Code, w.Body)
	}
	run(t, Debug(Full(g, log)), "@", []call{{"GET", "/leases", ``, 200, "{}\n"}})
}

// A body of any length is read up to the limit only.
func TestLongBody(t *testing.T) {
	body := `{"Name":"` + strings.Repeat("a", maxBody) + `"}`
	run(t, Services(newFake(), slog.New(slog.DiscardHandler)), "@", []call{
		{"POST", addPath, body, 400, "http: request body too large\n"},
		{"POST", addPath, body[:maxBody-2] + `"}`, 200, ""},
	})
	run(t, Inside(newFake()), "192.168.127.2:5000", []call{
		{"POST", exposePath, body[:maxInsideBody] + `"}`, 400, "http: request body too large\n"},
	})
}
