// Package sock opens the unix sockets that the daemon listens on, those that systemd hands over and its own, and serves
// HTTP on them.
package sock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// ErrInUse says that somebody answers on the path.
var ErrInUse = errors.New("another process listens on it")

// maxPath is the room for a path in struct sockaddr_un, without the zero byte.
const maxPath = 107

// Listen listens on a unix socket at path that only its owner can connect to (mode 0600). It makes missing parent
// directories and takes the place of a socket that nobody answers on any more; where somebody does, the error wraps
// ErrInUse. Closing the listener removes the socket.
func Listen(path string) (_ net.Listener, err error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("listen on %s: the path is longer than %d bytes", path, maxPath)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("listen on %s: %w", path, err)
		}
	}()
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The file takes the mode of the socket that is bound to it (Linux, unix_bind): it is never open to others, not
	// even between bind and chmod.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	var op *net.OpError
	if errors.As(err, &op) {
		return nil, op.Err // without the path, which is said already
	}
	return l, err
}

// lock keeps two daemons from finding the same stale socket and removing each other's new one.
func lock(dir string) (unlock func() error, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f.Close, nil
}

func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return errors.New("there is a file that is not a socket")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		conn.Close()
		return ErrInUse
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	// A full backlog (EAGAIN) or another kind of socket (EPROTOTYPE) is somebody, too.
	return fmt.Errorf("%w: %w", ErrInUse, err)
}

// Inherited are the listeners that systemd handed over, by the name that their socket unit gives them
// (FileDescriptorName=). Its nil map is that of a process without any.
type Inherited map[string]net.Listener

// Inherit takes over what systemd passed to the process. It is to be called once, early: it also removes the
// variables that say so from the environment, so that children do not see them.
func Inherit() (_ Inherited, err error) {
	named, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("take over systemd's sockets: %w", err)
	}
	in := make(Inherited)
	defer func() {
		if err != nil {
			for _, ls := range named {
				for _, l := range ls {
					l.Close()
				}
			}
		}
	}()
	for name, ls := range named {
		if len(ls) != 1 {
			return nil, fmt.Errorf("take over systemd's sockets: %d are called %s", len(ls), name)
		}
		in[name] = ls[0]
	}
	return in, nil
}

// Listen returns the listener called name and forgets it, or listens on path if there is none.
func (in Inherited) Listen(name, path string) (net.Listener, error) {
	if l, ok := in[name]; ok {
		delete(in, name)
		return l, nil
	}
	return Listen(path)
}

// Close closes the listeners that nobody asked for.
func (in Inherited) Close() error {
	var errs []error
	for name, l := range in {
		errs = append(errs, l.Close())
		delete(in, name)
	}
	return errors.Join(errs...)
}
