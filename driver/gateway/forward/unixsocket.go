package forward

import (
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/usernet/usernet/vsock"
)

// unixListener is a unix socket whose file goes with it, unless somebody else has put theirs in its place.
type unixListener struct {
	net.Listener
	path string
	file fs.FileInfo
}

// listenUnix listens at path, for this process's user only.
func listenUnix(path string) (net.Listener, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	u := url.URL{Scheme: "unix", Path: filepath.ToSlash(path)}
	if !strings.HasPrefix(u.Path, "/") { // C:/… on Windows
		u.Path = "/" + u.Path
	}
	at, err := vsock.Parse(u.String())
	if err != nil {
		return nil, err
	}
	l, err := vsock.Listen(at)
	if err != nil {
		return nil, err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	file, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &unixListener{l, path, file}, nil
}

// Close removes the file while the socket still answers, so that nobody takes the socket for a stale one meanwhile.
func (l *unixListener) Close() error {
	var err error
	if now, e := os.Lstat(l.path); e == nil && os.SameFile(now, l.file) {
		err = os.Remove(l.path)
	}
	return errors.Join(err, l.Listener.Close())
}
