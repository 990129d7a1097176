package vsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"
)

// busyFor is how long a unix socket whose backlog is full is tried again.
const busyFor = 5 * time.Second

func dialPlain(ctx context.Context, a Addr) (net.Conn, error) { return dialUnix(ctx, a.file(a.path)) }

func listenPlain(a Addr) (net.Listener, error) { return listenUnix(a.file(a.path)) }

// dialUnix tries again while the listener's backlog is full. A blocking connect(2) waits then; one that does not block
// returns EAGAIN, and nothing tells when there is room.
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	limit := time.Now().Add(busyFor)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		conn, err := d.DialContext(ctx, "unix", path)
		if !errors.Is(err, errBusy) || time.Now().After(limit) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), bare(err))
		case <-time.After(wait):
		}
	}
}

// listenUnix listens at path, in the place of a socket that nobody answers on.
func listenUnix(path string) (net.Listener, error) {
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	return bindUnix(path)
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
		return fmt.Errorf("%s is there and is no socket", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		conn.Close()
		return ErrInUse
	case errors.Is(err, errRefused):
		return os.Remove(path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	// A full backlog (EAGAIN) or another kind of socket (EPROTOTYPE) is somebody, too.
	return fmt.Errorf("%w: %w", ErrInUse, bare(err))
}

func dialTCP(ctx context.Context, a Addr) (net.Conn, error) {
	host, port, err := net.SplitHostPort(a.host)
	if err != nil {
		return nil, err
	}
	if host == "" || port == "0" {
		return nil, errors.New("to dial takes a host and a port")
	}
	var d net.Dialer
	d.SetMultipathTCP(false)
	return d.DialContext(ctx, "tcp", a.host)
}

// listenTCP leaves multipath TCP, Go's default, off: it is slower, and the kernel does not splice it.
func listenTCP(a Addr) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp", a.host)
}

func dialFD(context.Context, Addr) (net.Conn, error) {
	return nil, errors.New("what systemd passes is to listen on, not to dial")
}
