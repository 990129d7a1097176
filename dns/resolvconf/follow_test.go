package resolvconf

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

// promptly is when a change must have been heard of; less than recheck, so that it was not found by looking.
const promptly = recheck / 2

// follow runs a follower of path until the test ends.
func follow(t *testing.T, path string) *Follower {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f := NewFollower(path, slog.New(slog.DiscardHandler))
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v, want nil", err)
		}
		goleak.VerifyNone(t)
	})
	return f
}

func (f *Follower) await(t *testing.T, list string) {
	t.Helper()
	want := servers(list)
	for deadline := time.Now().Add(promptly); !slices.Equal(f.Servers(), want); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("servers %v, want %v", f.Servers(), want)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFollowChanges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, path, "nameserver 192.0.2.1\n")
	f := follow(t, path)
	f.await(t, "192.0.2.1")

	write(t, path+".new", "nameserver 192.0.2.2\n")
	must(t, os.Rename(path+".new", path))
	f.await(t, "192.0.2.2")

	write(t, path, "nameserver 192.0.2.3\nsearch a.example\n")
	f.await(t, "192.0.2.3")
	if got := f.Config().Search; !slices.Equal(got, []string{"a.example"}) {
		t.Errorf("search %v", got)
	}

	// Without a resolver in it the file says nothing new, whether it is empty or gone.
	must(t, os.Truncate(path, 0))
	must(t, os.Remove(path))
	write(t, path, "search b.example\n")
	for !slices.Equal(f.Config().Search, []string{"b.example"}) {
		time.Sleep(time.Millisecond)
	}
	f.await(t, "192.0.2.3")

	must(t, os.Remove(path))
	write(t, path, "nameserver 192.0.2.4\n")
	f.await(t, "192.0.2.4")
}

func TestFollowLinks(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.Mkdir(filepath.Join(dir, "etc"), 0o755))
	path := filepath.Join(dir, "etc", "resolv.conf")
	must(t, os.Symlink("../run/resolve/stub.conf", path))
	f := follow(t, path)
	f.await(t, "127.0.0.1 ::1") // the file is missing, and so are two directories

	run := filepath.Join(dir, "run", "resolve")
	must(t, os.MkdirAll(run, 0o755))
	write(t, filepath.Join(run, "stub.conf"), "nameserver 192.0.2.1\n")
	f.await(t, "192.0.2.1")

	// The directory is made anew, as a service's run directory is when it starts again.
	must(t, os.RemoveAll(run))
	must(t, os.MkdirAll(run, 0o755))
	write(t, filepath.Join(run, "stub.conf"), "nameserver 192.0.2.2\n")
	f.await(t, "192.0.2.2")

	// The link leads elsewhere, and then the file there changes.
	write(t, filepath.Join(dir, "other.conf"), "nameserver 192.0.2.3\n")
	must(t, os.Symlink(filepath.Join(dir, "other.conf"), path+".new"))
	must(t, os.Rename(path+".new", path))
	f.await(t, "192.0.2.3")
	write(t, filepath.Join(dir, "other.conf"), "nameserver 192.0.2.4\n")
	f.await(t, "192.0.2.4")
}

func TestFollowWhatIsNoFile(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"a loop of links": func(path string) error { return os.Symlink(path, path) },
		"a directory":     func(path string) error { return os.Mkdir(path, 0o755) },
		"a binary": func(path string) error {
			return os.WriteFile(path, slices.Repeat([]byte{0, '\n', 0xff}, maxSize), 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "resolv.conf")
			must(t, make(path))
			f := follow(t, path)
			f.await(t, "127.0.0.1 ::1")
			write(t, path+".new", "nameserver 192.0.2.1\n")
			must(t, os.RemoveAll(path))
			must(t, os.Rename(path+".new", path))
			f.await(t, "192.0.2.1")
		})
	}
}

// Where nothing is heard of changes, as on a network's file system, they are found by looking.
func TestLooksWithoutHearing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, path, "nameserver 192.0.2.1\n")
	synctest.Test(t, func(t *testing.T) {
		f := NewFollower(path, slog.New(slog.DiscardHandler))
		var deaf *watcher
		write(t, path, "nameserver 192.0.2.2\n")
		start := time.Now()
		deaf.wait(t.Context(), recheck)
		if waited := time.Since(start); waited <= 0 || waited > recheck {
			t.Errorf("looked after %v, want at most %v", waited, recheck)
		}
		f.read()
		if got := f.Servers(); !slices.Equal(got, servers("192.0.2.2")) {
			t.Errorf("servers %v", got)
		}
	})
}
