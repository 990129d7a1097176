package publish

import (
	"net/http"
	"testing"
)

// One guest leaves sessions for the others, under however many numbers it comes.
func TestSessionsOfOneGuest(t *testing.T) {
	names := make(chan string, 1)
	g := newGateway(t, ServerConfig{Limits: Limits{Sessions: 4, GuestSessions: 2}, Guest: func(*http.Request) string { return <-names }})
	connect := func(guest, number string) (*link, string) {
		names <- guest
		c := NewClient(ClientConfig{Dial: g.dial, Log: testLog(t)})
		c.number = number
		l, err := c.connect(soon(t))
		if err != nil {
			return nil, err.Error()
		}
		t.Cleanup(func() { l.lines.conn.Close() })
		return l, ""
	}
	first := newNumber()
	for _, row := range []struct{ guest, number, want string }{
		{"vm1", first, ""},
		{"vm1", newNumber(), ""},
		{"vm1", newNumber(), "too many sessions, vm1 has 2"},
		{"vm1", first, ""}, // takes the place of the first
		{"vm2", newNumber(), ""},
		{"vm3", newNumber(), ""},
		{"vm3", newNumber(), "too many sessions, there are 4"},
	} {
		if _, err := connect(row.guest, row.number); err != row.want {
			t.Errorf("%s: %q, want %q", row.guest, err, row.want)
		}
	}
	l, _ := connect("vm2", first) // whose number it is does not matter
	if l == nil {
		t.Fatal("vm2 has no second session")
	}
	eventually(t, "one of vm1", func() bool { g.Server.mu.Lock(); defer g.Server.mu.Unlock(); return g.countLocked("vm1") == 1 })
	if _, err := connect("vm1", newNumber()); err != "too many sessions, there are 4" {
		t.Errorf("vm1 in the place of nobody: %q", err)
	}
	l.lines.conn.Close()
	eventually(t, "three sessions", func() bool { g.Server.mu.Lock(); defer g.Server.mu.Unlock(); return len(g.sessions) == 3 })
	if _, err := connect("vm1", newNumber()); err != "" {
		t.Errorf("vm1 in the place of another: %q", err)
	}
}
