package forward

import (
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"testing"

	"github.com/usernet/usernet/driver/gvproxy"
)

func TestPipePath(t *testing.T) {
	const good = `\\.\pipe\podman-machine`
	for local, want := range map[string]string{
		"npipe:////./pipe/podman-machine":      good,
		`npipe:\\\\.\pipe\podman-machine`:      good,
		"//./pipe/podman-machine":              good,
		`\\.\pipe\podman-machine`:              good,
		"npipe:////./pipe/":                    "",
		"npipe:////./pipe/a/b":                 "",
		"npipe://server/pipe/name":             "",
		"npipe:////server/pipe/name":           "",
		`\\server\pipe\name`:                   "",
		"npipe:////./pipe/name?x=y":            "",
		"unix:////./pipe/name":                 "",
		"npipe:////./pipe/%zz":                 "",
		"C:/name":                              "",
		"":                                     "",
		"//./pipe/" + strings.Repeat("x", 241): "",
	} {
		if got, err := pipePath(local); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v, want %q", local, got, err, want)
		}
	}
}

func FuzzPipePath(f *testing.F) {
	f.Add("npipe:////./pipe/podman-machine")
	f.Add(`\\.\pipe\x`)
	f.Fuzz(func(t *testing.T, local string) {
		path, err := pipePath(local)
		if err != nil {
			return
		}
		name, ok := strings.CutPrefix(path, `\\.\pipe\`)
		if !ok || name == "" || strings.ContainsAny(name, "/\\\x00") {
			t.Errorf("%q leads to %q", local, path)
		}
		if again, err := pipePath(path); again != path || err != nil {
			t.Errorf("%q, and again %q, %v", path, again, err)
		}
	})
}

func TestNoPipes(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("named pipes are there")
	}
	spec, err := gvproxy.ParseForward(gvproxy.NPipe, "npipe:////./pipe/usernet-test", "tcp://127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), spec, newFake(), slog.New(slog.DiscardHandler))
	want := `listen npipe \\.\pipe\usernet-test: named pipes are there on windows only: unsupported operation`
	if err == nil || err.Error() != want || !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("error %v, want %s", err, want)
	}
}
