package resolvconf

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// changes are the events of inotify(7) by which an entry of a directory can become another file or have other text.
const changes = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_CLOSE_WRITE |
	unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// watcher waits for changes of entries of directories. Directories are watched, not files: those who change the file
// mostly put another in its place. A nil watcher hears of nothing.
type watcher struct {
	file   *os.File
	places []place
	dirs   map[int32]string // by watch descriptor
	buf    []byte
}

func newWatcher() (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	return &watcher{file: os.NewFile(uintptr(fd), "inotify"), buf: make([]byte, 64<<10)}, nil
}

// Close ends the wait. It may be called at any time, and again.
func (w *watcher) Close() {
	if w != nil {
		w.file.Close()
	}
}

// watch replaces what is waited for.
func (w *watcher) watch(places []place) error {
	if w == nil {
		return nil
	}
	conn, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	dirs := make(map[int32]string)
	var errs []error
	err = conn.Control(func(fd uintptr) { // holds the descriptor: Close may come from elsewhere
		for _, p := range places {
			wd, err := unix.InotifyAddWatch(int(fd), p.dir, changes)
			if err != nil {
				errs = append(errs, fmt.Errorf("watch %s: %w", p.dir, err))
				continue
			}
			dirs[int32(wd)] = p.dir
		}
		for wd := range w.dirs {
			if _, ok := dirs[wd]; !ok {
				unix.InotifyRmWatch(int(fd), uint32(wd)) // it may have gone with its directory
			}
		}
	})
	w.places, w.dirs = places, dirs
	return errors.Join(append(errs, err)...)
}

// wait returns when something has changed, after the time given, or when ctx is done.
func (w *watcher) wait(ctx context.Context, most time.Duration) {
	if w == nil {
		sleep(ctx, most)
		return
	}
	deadline := time.Now().Add(most)
	w.file.SetReadDeadline(deadline)
	for {
		n, err := w.file.Read(w.buf)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				sleep(ctx, time.Until(deadline))
			}
			return
		}
		if w.concerns(w.buf[:n]) {
			return
		}
	}
}

// concerns tells whether one of the events is about a place that is waited for. An event is a struct inotify_event:
// watch descriptor, mask, cookie and length, four bytes each, and a name that is filled up with zeros.
func (w *watcher) concerns(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		wd, mask := int32(binary.NativeEndian.Uint32(events)), binary.NativeEndian.Uint32(events[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		if end > len(events) {
			return true
		}
		name := string(bytes.TrimRight(events[unix.SizeofInotifyEvent:end], "\x00"))
		events = events[end:]
		if mask&unix.IN_Q_OVERFLOW != 0 {
			return true
		}
		if dir, ok := w.dirs[wd]; ok && (name == "" || slices.Contains(w.places, place{dir, name})) {
			return true // without a name it is about the directory itself
		}
	}
	return false
}
