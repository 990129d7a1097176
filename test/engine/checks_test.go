package engine

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
)

// recorder is a test that may fail.
type recorder struct {
	testing.TB
	failures []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatal(args ...any) {
	r.failures = append(r.failures, fmt.Sprint(args...))
	panic(r)
}

// failures are how a check fails.
func failures(t *testing.T, check func(t testing.TB)) string {
	r := &recorder{TB: t}
	func() {
		defer func() {
			if p := recover(); p != nil && p != any(r) {
				panic(p)
			}
		}()
		check(r)
	}()
	return strings.Join(r.failures, "\n")
}

// What the suites share fails when it should, and only then.
func TestChecks(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello from www") }))
	addr := strings.TrimPrefix(server.URL, "http://")
	defer server.Close()
	here, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	none := httptest.NewServer(nil)
	nobody := strings.TrimPrefix(none.URL, "http://")
	none.Close()
	look := Look{Patience: 10 * time.Millisecond, Attempt: time.Second}

	exit := func(status string) error {
		return fmt.Errorf("engine: %w", exec.Command("sh", "-c", "exit "+status).Run())
	}
	cli := CLI{"engine", func(_ context.Context, args ...string) (string, error) {
		switch args[len(args)-1] {
		case "works":
			return "it does", nil
		case "gives-up":
			return "", exit("1")
		case "crashes":
			return "", exit("2")
		}
		return "", errors.New("no such thing")
	}}
	ports := PSEndpoint{Ports: []PSPort{{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, {Proto: "udp", HostPort: 53, ContainerPort: 53, Error: "taken"}}}
	for _, c := range []struct {
		name  string
		check func(t testing.TB)
		want  string // in its failure; "" is none
	}{
		{"page", func(t testing.TB) { look.Page(t, here, addr, "hello", "www") }, ""},
		{"other page", func(t testing.TB) { look.Page(t, here, addr, "hello", "other") }, `got "hello from www", want "other"`},
		{"page of nobody", func(t testing.TB) { look.Page(t, here, nobody) }, "refused"},
		{"no page", func(t testing.TB) { look.NoPage(t, here, nobody) }, ""},
		{"no page but one", func(t testing.TB) { look.NoPage(t, here, addr) }, "worked"},
		{"udp of nobody", func(t testing.TB) { look.UDP(t, here, nobody, "") }, "refused"},
		{"must", func(t testing.TB) { cli.Must(t, "works") }, ""},
		{"must not", func(t testing.TB) { cli.Must(t, "what") }, "no such thing"},
		{"refused", func(t testing.TB) { cli.Refused(t, []string{"such"}, "what") }, ""},
		{"refused otherwise", func(t testing.TB) { cli.Refused(t, []string{"such", "why"}, "what") }, `misses "why"`},
		{"not refused", func(t testing.TB) { cli.Refused(t, nil, "works") }, "engine works: worked"},
		{"works", func(t testing.TB) { cli.Works(t, "does", "c", "works") }, ""},
		{"works otherwise", func(t testing.TB) { cli.Works(t, "not", "c", "works") }, `want "not"`},
		{"works not", func(t testing.TB) { cli.Works(t, "", "c", "gives-up") }, "exit status 1"},
		{"fails", func(t testing.TB) { cli.Fails(t, "c", "gives-up") }, ""},
		{"fails badly", func(t testing.TB) { cli.Fails(t, "c", "crashes") }, "want a failure"},
		{"fails not", func(t testing.TB) { cli.Fails(t, "c", "works") }, "want a failure"},
		{"publishes", func(t testing.TB) { ports.Publishes(t, "c", "53->53/udp taken", "8080->80/tcp") }, ""},
		{"publishes less", func(t testing.TB) { ports.Publishes(t, "c", "8080->80/tcp") }, "taken"},
	} {
		got := failures(t, c.check)
		if got != "" && c.want == "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: failed with %q, want %q", c.name, got, c.want)
		}
	}
}
