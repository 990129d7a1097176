package load

import (
	"errors"
	"net/netip"
	"os"
	"testing"

	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

func init() {
	Init(map[string]func([]string) error{"fail": func(args []string) error { return errors.New(args[0] + " of its own") }})
}

func TestLoads(t *testing.T) {
	nettest.NoLeaks(t)
	to := Serve(t, nil, netip.MustParseAddr("127.0.0.1"))
	for _, kind := range []string{"up", "down", "rr", "connect"} {
		v, tail := Drive(t, nil, to, kind, .1, 2)
		if v <= 0 || tail <= 0 && (kind == "rr" || kind == "connect") {
			t.Errorf("%s: %v, %v", kind, v, tail)
		}
	}
	Hold(t, nil, to, 32)()
}

func TestStart(t *testing.T) {
	nettest.NoLeaks(t)
	if got, want := Start(t, nil, nil, "fail", "errors").Line(), "error: errors of its own"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := Start(t, nil, nil, "drive", "127.0.0.1:1", "up", .1, 1).Line(), "error: dial tcp 127.0.0.1:1: connect: connection refused"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
