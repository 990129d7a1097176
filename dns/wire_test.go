//go:build linux

package dns

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	miekg "github.com/miekg/dns"
)

// offline answers without upstream, as text: the code, what is in the answer, and flags and sections worth a word.
func offline(t testing.TB, r *Resolver, q *miekg.Msg) *miekg.Msg {
	t.Helper()
	msg, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	reply, via := r.answer(new(query), nil, msg, peer{by: overUDP})
	if via != nil {
		return nil
	}
	m := new(miekg.Msg)
	if err := m.Unpack(reply); err != nil {
		t.Fatalf("%v: reply %x: %v", q.Question, reply, err)
	}
	return m
}

func localResolver(servers func() []netip.AddrPort) *Resolver {
	var z Zones
	z.Add(Zone{Name: "crc.testing", Records: []ZoneRecord{{Name: "api", IP: netip.MustParseAddr("10.200.1.8")}}})
	return New(Config{Sources: []Source{testRecords(), &z}, Servers: servers, Log: slog.New(slog.DiscardHandler)})
}

func TestAnswers(t *testing.T) {
	const upstream = "upstream"
	r := localResolver(func() []netip.AddrPort { return nil })
	for _, tt := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"web", miekg.TypeA, "NOERROR 10.200.1.2"},
		{"WeB.DNS.podman", miekg.TypeAAAA, "NOERROR fd00:1::2"},
		{"web", miekg.TypeANY, "NOERROR 10.200.1.2 fd00:1::2"},
		{"front", miekg.TypeA, "NOERROR 10.200.1.2 10.200.1.3"},
		{"db", miekg.TypeAAAA, "NOERROR, SOA of db."},
		{"db.dns.podman", miekg.TypeAAAA, "NOERROR, SOA of dns.podman."},
		{"web", miekg.TypeMX, "NOERROR, SOA of web."},
		{"web", miekg.TypeHTTPS, "NOERROR, SOA of web."},
		{"web", 65280, "NOERROR, SOA of web."},
		{"nobody.dns.podman", miekg.TypeA, "NXDOMAIN, SOA of dns.podman."},
		{"nobody.dns.podman", miekg.TypeTXT, "NXDOMAIN, SOA of dns.podman."},
		{"dns.podman", miekg.TypeSOA, "NOERROR, SOA of dns.podman."},
		{"nobody", miekg.TypeA, upstream},
		{"web.example.com", miekg.TypeA, upstream},
		{"2.1.200.10.in-addr.arpa", miekg.TypePTR, "NOERROR web.dns.podman."},
		{"2.1.200.10.in-addr.arpa", miekg.TypeA, "NOERROR, SOA of 2.1.200.10.in-addr.arpa."},
		{"99.1.200.10.in-addr.arpa", miekg.TypePTR, "NXDOMAIN, SOA of 1.200.10.in-addr.arpa."},
		{"1.2.0.192.in-addr.arpa", miekg.TypePTR, upstream},
		{"host.docker.internal", miekg.TypeA, "NOERROR 10.200.1.254"},
		{"host.docker.internal", miekg.TypeAAAA, "NOERROR, SOA of host.docker.internal."},
		{"gateway.containers.internal", miekg.TypeAAAA, "NOERROR fd00:1::1"},
		{"api.crc.testing", miekg.TypeA, "NOERROR 10.200.1.8"},
		{"api.crc.testing", miekg.TypeAAAA, "NOERROR, SOA of crc.testing."},
		{"nothing.crc.testing", miekg.TypeA, "NXDOMAIN, SOA of crc.testing."},
		{"localhost", miekg.TypeA, "NOERROR 127.0.0.1"},
		{"a.b.localhost", miekg.TypeAAAA, "NOERROR ::1"},
		{"localhost", miekg.TypeTXT, "NOERROR, SOA of localhost."},
		{"1.0.0.127.in-addr.arpa", miekg.TypePTR, "NOERROR localhost."},
		{"2.0.0.127.in-addr.arpa", miekg.TypePTR, "NXDOMAIN, SOA of 127.in-addr.arpa."},
		{"foo.invalid", miekg.TypeA, "NXDOMAIN, SOA of invalid."},
		{"_dns.resolver.arpa", miekg.TypeSVCB, "NOERROR, SOA of resolver.arpa."},
		{".", miekg.TypeNS, upstream},
		{"web", miekg.TypeAXFR, "REFUSED"},
	} {
		for _, edns := range []bool{false, true} {
			q := question(tt.name, tt.qtype)
			if edns {
				q.SetEdns0(1400, true)
			}
			q.CheckingDisabled = edns
			m := offline(t, r, q)
			if m == nil {
				if tt.want != upstream {
					t.Errorf("%s %v goes upstream, want %s", tt.name, miekg.Type(tt.qtype), tt.want)
				}
				continue
			}
			got := strings.Join(append([]string{miekg.RcodeToString[m.Rcode]}, data(m.Answer)...), " ")
			if len(m.Ns) > 0 {
				got += ", SOA of " + m.Ns[0].(*miekg.SOA).Hdr.Name
			}
			if got != tt.want {
				t.Errorf("%s %v: %s, want %s", tt.name, miekg.Type(tt.qtype), got, tt.want)
			}
			refused := m.Rcode == miekg.RcodeRefused
			if m.Id != q.Id || !m.Response || m.Authoritative == refused || !m.RecursionDesired || !m.RecursionAvailable ||
				m.Truncated || m.AuthenticatedData || m.CheckingDisabled != edns || m.Question[0] != q.Question[0] {
				t.Errorf("%s %v: header %+v %v", tt.name, miekg.Type(tt.qtype), m.MsgHdr, m.Question)
			}
			if opt := m.IsEdns0(); (opt != nil) != edns || edns && (!opt.Do() || opt.UDPSize() != udpSize || opt.Version() != 0) {
				t.Errorf("%s %v: EDNS %v gives %v", tt.name, miekg.Type(tt.qtype), edns, opt)
			}
		}
	}
}

// On a network without a way out, what is not known here does not exist.
func TestAnswersWithoutUpstream(t *testing.T) {
	r := localResolver(nil)
	if m := offline(t, r, question("web", miekg.TypeA)); len(m.Answer) != 1 {
		t.Errorf("web: %v", m)
	}
	for _, name := range []string{"example.com", "."} {
		if m := offline(t, r, question(name, miekg.TypeA)); m.Rcode != miekg.RcodeNameError || len(m.Ns) != 1 {
			t.Errorf("%s: %v", name, m)
		}
	}
}

func TestKeepUnqualified(t *testing.T) {
	for _, keep := range []bool{false, true} {
		r := New(Config{Sources: []Source{testRecords()}, Servers: func() []netip.AddrPort { return nil }, KeepUnqualified: keep})
		for _, tt := range []struct {
			name  string
			qtype uint16
			kept  bool
		}{
			{"nobody", miekg.TypeA, keep}, {"nobody", miekg.TypeAAAA, keep}, {"com", miekg.TypeDS, false}, {".", miekg.TypeA, false},
			{"nobody.example", miekg.TypeA, false},
		} {
			m := offline(t, r, question(tt.name, tt.qtype))
			if (m != nil) != tt.kept || tt.kept && m.Rcode != miekg.RcodeNameError {
				t.Errorf("KeepUnqualified %v: %s %v: %v", keep, tt.name, miekg.Type(tt.qtype), m)
			}
		}
		if m := offline(t, r, question("web", miekg.TypeA)); m == nil || len(m.Answer) != 1 {
			t.Errorf("KeepUnqualified %v: web: %v", keep, m)
		}
	}
}

func TestAnswersInTurn(t *testing.T) {
	r := testRecords()
	for i := range 4 {
		r.Set(fmt.Sprint("x", i), Entry{Names: []string{"many"}, Addrs: addrs(fmt.Sprintf("10.200.1.%d", 10+i), fmt.Sprintf("fd00:1::%d", 10+i))})
	}
	res := New(Config{Sources: []Source{r}})
	first := make(map[string]int)
	for range 400 { // each of the eight misses all of 400 drawings with 4 * (3/4)^200 < 10^-24
		for _, qtype := range []uint16{miekg.TypeA, miekg.TypeAAAA} {
			m := offline(t, res, question("many", qtype))
			if len(m.Answer) != 4 {
				t.Fatal(m)
			}
			first[data(m.Answer[:1])[0]]++
		}
	}
	if len(first) != 8 {
		t.Errorf("came first: %v, want each of the eight addresses at times", first)
	}
}

func TestBadQuestions(t *testing.T) {
	r := localResolver(func() []netip.AddrPort { return nil })
	good := "123401000001000000000000" + "03777777" + "00" + "00010001"
	opt := "0000290200000000000000"
	with := func(at int, b string) string { return good[:2*at] + b + good[2*at+len(b):] }
	for _, tt := range []struct {
		name, msg string
		want      int // -1: no reply; -2: upstream
	}{
		{"good", good, -2},
		{"nothing", "", -1},
		{"half a header", good[:20], -1},
		{"an answer", with(2, "81"), -1},
		{"opcode status", with(2, "10"), miekg.RcodeNotImplemented},
		{"opcode update", with(2, "28"), miekg.RcodeNotImplemented},
		{"no question", good[:10] + "00" + good[12:24], miekg.RcodeFormatError},
		{"two questions", with(5, "02") + "03777777" + "00" + "00010001", miekg.RcodeFormatError},
		{"cut", good[:len(good)-2], miekg.RcodeFormatError},
		{"a pointer for a name", good[:24] + "c00c" + "00010001", miekg.RcodeFormatError},
		{"an extended label", good[:24] + "40" + "00" + "00010001", miekg.RcodeFormatError},
		{"a long name", good[:24] + strings.Repeat("3f"+strings.Repeat("61", 63), 4) + "00" + "00010001", miekg.RcodeFormatError},
		{"OPT", with(11, "01") + opt, -2},
		{"two OPT", with(11, "02") + opt + opt, miekg.RcodeFormatError},
		{"OPT is cut", with(11, "01") + opt[:20], miekg.RcodeFormatError},
		{"OPT with half an option", with(11, "01") + opt[:18] + "0002000a", -2},
		{"EDNS version 1", with(11, "01") + opt[:12] + "01" + opt[14:], miekg.RcodeBadVers},
		{"something follows", good + "00", -2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			msg, err := hex.DecodeString(tt.msg)
			if err != nil {
				t.Fatal(err)
			}
			reply, via := r.answer(new(query), nil, msg, peer{by: overUDP})
			switch {
			case tt.want == -2 || tt.want == -1:
				if reply != nil || (via != nil) != (tt.want == -2) {
					t.Errorf("reply %x, upstream %v", reply, via != nil)
				}
			default:
				var m miekg.Msg
				if err := m.Unpack(reply); err != nil || m.Rcode != tt.want || m.Id != 0x1234 || !m.Response {
					t.Errorf("reply %x: %v, code %d, want %d", reply, err, m.Rcode, tt.want)
				}
			}
		})
	}
}

func TestTruncate(t *testing.T) {
	var answer, authority []string
	for i := range 50 {
		answer = append(answer, fmt.Sprintf("www.example.com. 60 IN A 192.0.2.%d", i))
		authority = append(authority, fmt.Sprintf("example.com. 60 IN NS ns%d.example.com.", i))
	}
	msg := packed(t, 0, answer, authority)
	for _, tt := range []struct{ limit, answers, authority int }{
		{len(msg), 50, 50}, {len(msg) - 1, 50, 0}, {512, (512 - 12 - 21 - 11) / 16, 0}, {33 + 11, 0, 0},
	} {
		cut := truncate(bytes.Clone(msg), tt.limit)
		var m miekg.Msg
		if err := m.Unpack(cut); err != nil {
			t.Fatalf("limit %d: %v", tt.limit, err)
		}
		if len(cut) > tt.limit || len(m.Answer) != tt.answers || len(m.Ns) != tt.authority || m.Truncated != (tt.authority == 0) || m.IsEdns0() == nil {
			t.Errorf("limit %d: %d bytes, %d answers, %d in the authority, truncated %v", tt.limit, len(cut), len(m.Answer), len(m.Ns), m.Truncated)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	for _, q := range []*miekg.Msg{
		question("web", miekg.TypeA), question("front.dns.podman", miekg.TypeANY).SetEdns0(600, true),
		question("2.1.200.10.in-addr.arpa", miekg.TypePTR), question("localhost", miekg.TypeMX), question(".", miekg.TypeNS),
	} {
		msg, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(msg, true)
	}
	f.Add([]byte("\x010\x010\x00\x01000000\xc0\x000000"), true) // a name that points into the header, and so ends in a zero
	r := localResolver(func() []netip.AddrPort { return nil })
	f.Fuzz(func(t *testing.T, msg []byte, stream bool) {
		var q query
		reply, via := r.answer(&q, nil, bytes.Clone(msg), peer{by: transport(stream)})
		if via != nil {
			q := q.clone()
			q.appendKey(nil)
			if reply, err := check(q.appendError(nil, miekg.RcodeServerFailure), q.msg); err != nil || len(reply) > q.limit(transport(stream)) {
				t.Fatalf("%x: failure %x: %v", msg, reply, err)
			}
			return
		}
		if reply == nil {
			return
		}
		if !stream && len(reply) > maxReply {
			t.Fatalf("%x: %d bytes", msg, len(reply))
		}
		var m miekg.Msg
		if err := m.Unpack(reply); err != nil {
			t.Fatalf("%x: reply %x: %v", msg, reply, err)
		}
	})
}

func FuzzUpstreamAnswer(f *testing.F) {
	ask, err := question("www.example.com", miekg.TypeA).SetEdns0(1232, false).Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed(f, 0, []string{wwwA, wwwA2, alias}, []string{soa}), 512)
	f.Add(packed(f, miekg.RcodeNameError, nil, []string{soa, ns}), 20)
	f.Add(ask, 100)
	f.Fuzz(func(t *testing.T, msg []byte, limit int) {
		if len(msg) > 2 {
			copy(ask, msg[:2])
		}
		good, err := check(bytes.Clone(msg), ask)
		if err != nil {
			return
		}
		c := newCache()
		c.put("k", bytes.Clone(good))
		if kept, ok := c.get(nil, []byte("k")); ok && !bytes.Equal(kept, good) {
			t.Fatalf("%x is kept as %x", good, kept)
		}
		var q query
		if rcode, ok := q.parse(ask); !ok || rcode != 0 {
			t.Fatal(rcode, ok)
		}
		limit = max(limit, miekg.MinMsgSize)
		cut := q.adopt(good, limit)
		if len(cut) > limit {
			t.Fatalf("%d bytes, want at most %d", len(cut), limit)
		}
		if _, err := walk(cut, len(q.question)+headerLen, func(record) {}); err != nil && flags(cut)&flagTC == 0 {
			t.Fatalf("%x, cut to %d: %x: %v", good, limit, cut, err)
		}
	})
}

// FuzzReadMessage reads what a client may send by TCP: messages behind their lengths, and the rest is none.
func FuzzReadMessage(f *testing.F) {
	f.Add([]byte{0, 1, 'x', 0, 0, 0, 5, 'x'})
	f.Add([]byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, wire []byte) {
		in := bufio.NewReaderSize(iotest.OneByteReader(bytes.NewReader(wire)), 16)
		var again, b []byte
		for {
			var err error
			if b, err = readMessage(noDeadline{}, in, b[:0], new(pending)); err != nil {
				if rest := wire[len(again):]; !bytes.HasPrefix(wire, again) || len(rest) >= 2 && len(rest) >= 2+int(binary.BigEndian.Uint16(rest)) {
					t.Errorf("%x ends with %v before %x", wire, err, rest)
				}
				return
			}
			again = append(binary.BigEndian.AppendUint16(again, uint16(len(b))), b...)
		}
	})
}

// noDeadline is a connection of which only the deadline is wanted.
type noDeadline struct{ net.Conn }

func (noDeadline) SetReadDeadline(time.Time) error { return nil }
