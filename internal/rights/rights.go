// Package rights sends values with descriptors beside them between processes on one machine: messages in JSON over
// SOCK_SEQPACKET, descriptors as SCM_RIGHTS (unix(7)).
package rights

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// Max is how many descriptors one message may carry.
	Max = 32
	// maxMessage is how many bytes it may have.
	maxMessage = 64 << 10
)

// Pair returns a connection and the other end of it, for a process that is about to be started. The caller closes both.
func Pair() (conn *net.UnixConn, other *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	other = os.NewFile(uintptr(fds[1]), "pair")
	f := os.NewFile(uintptr(fds[0]), "pair")
	defer f.Close()
	if conn, err = Conn(f); err != nil {
		other.Close()
		return nil, nil, err
	}
	return conn, other, nil
}

// Conn is the connection of a descriptor that came from Pair. f stays the caller's.
func Conn(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%s is no unix socket", f.Name())
	}
	return u, nil
}

// Send sends a value, with descriptors that stay the caller's.
func Send(conn *net.UnixConn, value any, fds ...int) error {
	b, err := json.Marshal(value)
	if err != nil {
		return err
	}
	if len(b) > maxMessage || len(fds) > Max {
		return fmt.Errorf("a message of %d bytes and %d descriptors is too long", len(b), len(fds))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = conn.WriteMsgUnix(b, oob, nil)
	return err
}

// Receive reads a value, and returns the descriptors that came with it, which the caller closes. io.EOF: the other end
// is closed.
func Receive(conn *net.UnixConn, value any) (fds []int, err error) {
	b := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4*Max))
	n, oobn, flags, _, err := conn.ReadMsgUnix(b, oob)
	if errors.Is(err, unix.ECONNRESET) || err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, err
	}
	if fds, err = parse(oob[:oobn]); err == nil {
		if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			err = errors.New("a message was cut")
		} else {
			err = json.Unmarshal(b[:n], value)
		}
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	return fds, nil
}

func parse(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		more, err := unix.ParseUnixRights(&m)
		if err != nil {
			return fds, err
		}
		fds = append(fds, more...)
	}
	return fds, nil
}
