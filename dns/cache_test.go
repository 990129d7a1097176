//go:build linux

package dns

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	miekg "github.com/miekg/dns"
)

// packed is an answer as it came from upstream.
func packed(t testing.TB, code int, answer, authority []string) []byte {
	t.Helper()
	m := reply(question("www.example.com", miekg.TypeA).SetEdns0(1232, false), answer...)
	m.Rcode = code
	for _, s := range authority {
		m.Ns = append(m.Ns, rr(s))
	}
	m.Compress = true
	msg, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

const (
	wwwA   = "www.example.com. 100 IN A 192.0.2.1"
	wwwA2  = "www.example.com. 60 IN A 192.0.2.2"
	alias  = "www.example.com. 30 IN CNAME example.com."
	soa    = "example.com. 900 IN SOA ns.example.com. root.example.com. 1 2 3 4 200"
	soaTTL = "example.com. 20 IN SOA ns.example.com. root.example.com. 1 2 3 4 200"
	ns     = "example.com. 900 IN NS ns.example.com."
)

func TestLifetime(t *testing.T) {
	for _, tt := range []struct {
		name              string
		code              int
		answer, authority []string
		want              time.Duration
	}{
		{"the shortest counts", 0, []string{wwwA, wwwA2}, nil, 60 * time.Second},
		{"in any section", 0, []string{wwwA}, []string{"example.com. 7 IN NS ns.example.com."}, 7 * time.Second},
		{"not for ever", 0, []string{"www.example.com. 604800 IN A 192.0.2.1"}, nil, cachePlain},
		{"zero", 0, []string{wwwA, "www.example.com. 0 IN A 192.0.2.2"}, nil, 0},
		{"more than 31 bits", 0, []string{"www.example.com. 2147483648 IN A 192.0.2.2"}, nil, 0},
		{"no data: SOA's minimum", 0, nil, []string{soa}, 200 * time.Second},
		{"no data: SOA's TTL", 0, nil, []string{soaTTL}, 20 * time.Second},
		{"no data behind an alias", 0, []string{alias}, []string{soa}, 30 * time.Second},
		{"no such name", miekg.RcodeNameError, nil, []string{soa}, 200 * time.Second},
		{"no such name, for long", miekg.RcodeNameError, nil,
			[]string{"example.com. 90000 IN SOA ns.example.com. root.example.com. 1 2 3 4 90000"}, cacheMissing},
		{"no such name behind an alias", miekg.RcodeNameError, []string{alias}, []string{soa}, 30 * time.Second},
		{"negative without SOA", miekg.RcodeNameError, nil, nil, 0},
		{"no data without SOA", 0, nil, nil, 0},
		{"a referral", 0, nil, []string{ns}, 0},
		{"a failure", miekg.RcodeServerFailure, nil, []string{soa}, 0},
		{"an extended code", miekg.RcodeBadVers, []string{wwwA}, []string{soa}, 0},
		{"refused", miekg.RcodeRefused, nil, []string{soa}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ttls := lifetime(packed(t, tt.code, tt.answer, tt.authority))
			if got != tt.want {
				t.Errorf("%v, want %v", got, tt.want)
			}
			if want := len(tt.answer) + len(tt.authority); got > 0 && len(ttls) != want {
				t.Errorf("%d TTLs, want %d", len(ttls), want)
			}
		})
	}
	cut := packed(t, 0, []string{wwwA}, nil)
	put16(cut, 2, flags(cut)|flagTC)
	if got, _ := lifetime(cut); got != 0 {
		t.Errorf("a truncated answer is kept for %v", got)
	}
}

func TestCacheCountsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache()
		c.put("k", packed(t, 0, []string{wwwA, wwwA2}, nil))
		for _, step := range []struct {
			wait time.Duration
			want string // the TTLs
		}{{0, "100 60"}, {1500 * time.Millisecond, "99 59"}, {58 * time.Second, "41 1"}, {499 * time.Millisecond, "41 1"}, {time.Millisecond, ""}, {0, ""}} {
			time.Sleep(step.wait)
			got := ""
			if msg, ok := c.get(nil, []byte("k")); ok {
				var m miekg.Msg
				if err := m.Unpack(msg); err != nil {
					t.Fatal(err)
				}
				got = fmt.Sprint(m.Answer[0].Header().Ttl, m.Answer[1].Header().Ttl)
				if !m.IsEdns0().Do() && m.IsEdns0().UDPSize() != 1400 {
					t.Errorf("OPT has changed: %v", m.IsEdns0())
				}
			}
			if got != step.want {
				t.Errorf("after %v more: TTLs %q, want %q", step.wait, got, step.want)
			}
		}
		if len(c.entries) != 0 || c.bytes != 0 || c.recent.Len() != 0 {
			t.Errorf("left: %d entries, %d bytes", len(c.entries), c.bytes)
		}
	})
}

func TestCacheIsBounded(t *testing.T) {
	c := newCache()
	msg := packed(t, 0, []string{wwwA}, nil)
	c.put("used", append([]byte(nil), msg...))
	for i := range 2 * cacheEntries {
		c.put(fmt.Sprint(i), append([]byte(nil), msg...))
		if _, ok := c.get(nil, []byte("used")); !ok {
			t.Fatalf("what is in use was thrown out after %d", i)
		}
	}
	if n := len(c.entries); n != cacheEntries || c.recent.Len() != n {
		t.Errorf("%d entries, want %d", n, cacheEntries)
	}
	var texts []string
	for i := range 200 {
		texts = append(texts, fmt.Sprintf("www.example.com. 100 IN TXT %q", strings.Repeat("x", 200)+fmt.Sprint(i)))
	}
	texts = append(texts, wwwA)
	big := packed(t, 0, texts, nil)
	for i := range 2 * cacheBytes / len(big) {
		c.put(fmt.Sprint("big", i), append([]byte(nil), big...))
		if c.bytes > cacheBytes {
			t.Fatalf("%d bytes, want at most %d", c.bytes, cacheBytes)
		}
	}
	sum := 0
	for _, el := range c.entries {
		sum += el.Value.(*cached).cost()
	}
	if sum != c.bytes {
		t.Errorf("counted %d bytes, have %d", c.bytes, sum)
	}
	for range 3 {
		c.put("same", append([]byte(nil), msg...))
	}
	for len(c.entries) > 0 {
		c.removeLocked(c.recent.Back())
	}
	if c.bytes != 0 {
		t.Errorf("%d bytes in an empty cache", c.bytes)
	}
}
