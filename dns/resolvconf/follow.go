package resolvconf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// maxSize is how much of the file is read, in bytes.
	maxSize = 64 << 10
	// maxLinks is how many symbolic links are followed, as in the kernel.
	maxLinks = 40
	// recheck is how often the file is read when nothing was heard of a change: not every file system tells.
	recheck = 30 * time.Second
)

// onThisHost are the resolvers that resolv.conf(5) promises where the file names none.
var onThisHost = []netip.AddrPort{
	netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port),
	netip.AddrPortFrom(netip.IPv6Loopback(), port),
}

// Follower knows what the file says now. Its methods may be called concurrently.
type Follower struct {
	path    string
	log     *slog.Logger
	current atomic.Pointer[Config]
	failed  bool // the last read; for Run only
}

// NewFollower reads the file at path, which need not exist. What changes in it later is seen while Run runs.
func NewFollower(path string, log *slog.Logger) *Follower {
	f := &Follower{path: path, log: log}
	f.current.Store(&Config{Servers: onThisHost})
	f.read()
	return f
}

// Config is what the file said last. A file that is gone, is empty or names no resolver, as happens for a moment when it
// is rewritten and for longer on a host without a network, leaves the resolvers as they were.
func (f *Follower) Config() Config {
	c := f.current.Load()
	return Config{Servers: slices.Clone(c.Servers), Search: slices.Clone(c.Search)}
}

// Servers are the resolvers of Config. The caller does not change the slice.
func (f *Follower) Servers() []netip.AddrPort { return f.current.Load().Servers }

// Run follows the file until ctx is done. Where changes cannot be heard of, it looks for them.
func (f *Follower) Run(ctx context.Context) error {
	w, err := newWatcher()
	if err != nil {
		f.log.Warn("cannot watch for changes, looking for them instead", "file", f.path, "err", err)
		w = nil
	}
	defer w.Close()
	defer context.AfterFunc(ctx, w.Close)()
	for ctx.Err() == nil {
		f.watch(w)
		f.read()
		w.wait(ctx, recheck)
	}
	return nil
}

// watch sees to it that what changes from now on ends w's wait. What led to the file may have changed before it was
// watched, hence the second look.
func (f *Follower) watch(w *watcher) {
	for range maxLinks {
		ps := places(f.path)
		if err := w.watch(ps); err != nil {
			f.log.Debug("cannot watch", "file", f.path, "err", err)
		}
		if slices.Equal(ps, places(f.path)) {
			return
		}
	}
}

// read reads the file and keeps what it says.
func (f *Follower) read() {
	text, err := readFile(f.path)
	if err != nil {
		if !f.failed && !errors.Is(err, fs.ErrNotExist) {
			f.log.Warn("cannot read the host's resolvers", "err", err)
		}
		f.failed = true
		return
	}
	f.failed = false
	now, old := Parse(text), *f.current.Load()
	if len(now.Servers) == 0 {
		now.Servers = old.Servers
	}
	if slices.Equal(now.Servers, old.Servers) && slices.Equal(now.Search, old.Search) {
		return
	}
	f.current.Store(&now)
	f.log.Debug("upstream resolvers", "file", f.path, "servers", now.Servers, "search", now.Search)
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() { // opening a pipe would block
		return nil, fmt.Errorf("read %s: not a regular file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, maxSize))
}

// place is an entry of a directory that has a say in what the file is.
type place struct{ dir, name string }

// places lists the entries that lead to the file at path: itself, the links that it is made of, and the file in the
// end. Where a directory is missing, it is the entry that the directory will be.
func places(path string) []place {
	var ps []place
	for range maxLinks {
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return append(ps, missing(filepath.Dir(path)))
		}
		p := place{dir, filepath.Base(path)}
		ps = append(ps, p)
		target, err := os.Readlink(filepath.Join(p.dir, p.name))
		if err != nil {
			return ps
		}
		if path = target; !filepath.IsAbs(path) {
			path = filepath.Join(dir, target)
		}
	}
	return ps
}

// missing finds the first entry on the way to dir that is not there.
func missing(dir string) place {
	for {
		parent := filepath.Dir(dir)
		if real, err := filepath.EvalSymlinks(parent); err == nil || parent == dir {
			return place{real, filepath.Base(dir)}
		}
		dir = parent
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
