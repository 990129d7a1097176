package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A namespace is passed as a descriptor beside the request that is about it (SCM_RIGHTS, unix(7)): a path may mean
// something else, or nothing, in the mount namespace of the daemon.

// maxRights is how many descriptors of one connection may wait to be taken. The kernel closes what exceeds the buffer for
// them in one read.
const maxRights = 4

// Listener wraps the control socket's listener so that Handler gets the descriptors that come with requests.
func Listener(l net.Listener) net.Listener { return rightsListener{l} }

type rightsListener struct{ net.Listener }

func (l rightsListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c, nil
	}
	return &rightsConn{UnixConn: u}, nil
}

// ConnContext gives the handlers their connection. Package internal/sock hands it to the HTTP server.
func (rightsListener) ConnContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

type connKey struct{}

// rightsConn keeps the descriptors that arrive while it is read.
type rightsConn struct {
	*net.UnixConn

	mu    sync.Mutex
	files []*os.File
}

func (c *rightsConn) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(maxRights*4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if oobn > 0 {
		c.keep(oob[:oobn])
	}
	return n, err
}

func (c *rightsConn) keep(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if len(c.files) == maxRights {
				unix.Close(fd)
				continue
			}
			c.files = append(c.files, os.NewFile(uintptr(fd), "passed"))
		}
	}
}

// take hands over the oldest descriptor that came; nil: there is none.
func (c *rightsConn) take() *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.files) == 0 {
		return nil
	}
	f := c.files[0]
	c.files = c.files[1:]
	return f
}

func (c *rightsConn) Close() error {
	var errs []error
	for f := c.take(); f != nil; f = c.take() {
		errs = append(errs, f.Close())
	}
	return errors.Join(append(errs, c.UnixConn.Close())...)
}

// passed is the descriptor that came with the request being served; nil: none did. The caller closes it.
func passed(ctx context.Context) *os.File {
	c, ok := ctx.Value(connKey{}).(*rightsConn)
	if !ok {
		return nil
	}
	return c.take()
}

// passingConn sends a descriptor with the first bytes that are written.
type passingConn struct {
	*net.UnixConn
	file *os.File
}

func (c *passingConn) Write(b []byte) (int, error) {
	if c.file == nil || len(b) == 0 {
		return c.UnixConn.Write(b)
	}
	n, _, err := c.WriteMsgUnix(b, unix.UnixRights(int(c.file.Fd())), nil)
	c.file = nil
	if err != nil {
		return n, fmt.Errorf("pass a descriptor: %w", err)
	}
	if n < len(b) { // a stream may take a part
		more, err := c.UnixConn.Write(b[n:])
		return n + more, err
	}
	return n, nil
}
