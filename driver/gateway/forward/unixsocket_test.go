package forward

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/vsock"
)

func TestUnix(t *testing.T) {
	noLeaks(t)
	path := filepath.Join(t.TempDir(), "a b%20c?.sock") // no URL
	n := newFake()
	f := start(t, n, gvproxy.Unix, path, "tcp://"+machine(t, "127.0.0.1", shout), nil)
	if st, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", st.Mode(), err)
	}
	ask(t, dial(t, "unix", path), strings.Repeat("hello", 100_000))
	if client := <-n.clients; client != (netip.AddrPort{}) {
		t.Errorf("client %s, want none", client)
	}
	closeSoon(t, f)
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v, want that the file is gone", err)
	}
}

// TestUnixFiles: a stale socket is replaced, and what is somebody else's stays.
func TestUnixFiles(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	target := "tcp://" + machine(t, "127.0.0.1", shout)
	start(t, newFake(), gvproxy.Unix, path, target, nil)
	ask(t, dial(t, "unix", path), "hello")

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{file, "no socket"},
		{link, "no socket"},
		{dir, "no socket"},
		{path, vsock.ErrInUse.Error()},
		{file + "/below", "not a directory"},
		{dir + "/none/s", "no such file"},
		{dir + "/" + strings.Repeat("x", 200), "107 bytes"},
		{"", ""},
	} {
		spec, err := gvproxy.ParseForward(gvproxy.Unix, tt.path, target)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := Open(t.Context(), spec, newFake(), slog.New(slog.DiscardHandler)); err == nil {
			f.Close()
			t.Errorf("listens at %s", tt.path)
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want … %s …", tt.path, err, tt.want)
		}
	}
	if text, err := os.ReadFile(link); err != nil || string(text) != "precious" {
		t.Errorf("the file afterwards: %q, %v", text, err)
	}
	ask(t, dial(t, "unix", path), "hello")
}

// TestUnixReplaced: Close leaves alone what somebody has put in the socket's place.
func TestUnixReplaced(t *testing.T) {
	noLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	f := start(t, newFake(), gvproxy.Unix, path, "tcp://127.0.0.1:1", nil)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	theirs := start(t, newFake(), gvproxy.Unix, path, "tcp://"+machine(t, "127.0.0.1", shout), nil)
	closeSoon(t, f)
	ask(t, dial(t, "unix", path), "hello")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	closeSoon(t, theirs) // whose file is gone
}

func TestUnixRefused(t *testing.T) {
	noLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	f := start(t, newFake(), gvproxy.Unix, path, "tcp://"+freePort(t, "127.0.0.1"), nil)
	turnedAway(t, "unix", path)
	eventually(t, "the failure is counted", func() bool { return f.Stats() == Stats{Accepted: 1, Failed: 1} })
}
