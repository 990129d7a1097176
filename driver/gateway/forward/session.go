package forward

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// session is an SSH server that let us in, for many connections at once.
type session struct {
	client *ssh.Client
	done   chan struct{} // closed when the transport is broken
	once   sync.Once
}

// end notes that the transport is broken.
func (s *session) end() { s.once.Do(func() { close(s.done) }) }

func (s *session) over() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// watched is a session's transport. It tells of a fault before the session does, which ends all its connections as if their other
// ends had done it.
type watched struct {
	net.Conn
	broke func()
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if err != nil {
		w.broke()
	}
	return n, err
}

func (w *watched) Close() error {
	w.broke()
	return w.Conn.Close()
}

// keep asks the server again and again whether it is there, and returns when the session is gone or ctx is done.
func (s *session) keep(ctx context.Context, times sshTimes) {
	stop := context.AfterFunc(ctx, func() { s.client.Close() })
	defer stop()
	defer s.client.Wait()
	defer s.client.Close()
	probe := time.NewTicker(times.probe)
	defer probe.Stop()
	for {
		select {
		case <-s.done:
			return
		case <-probe.C:
		}
		silence := time.AfterFunc(times.silence, func() { s.client.Close() })
		// What the answer says does not matter.
		_, _, err := s.client.SendRequest("keepalive@openssh.com", true, nil)
		silence.Stop()
		if err != nil {
			return
		}
	}
}

// relay carries both directions until both have ended, and closes both ends. What ends in any other way than by an end of file
// is reset on the host; SSH has no such thing.
func (s *session) relay(host, guest net.Conn) {
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-s.done:
			reset(host)
		case <-over:
		}
	})
	out := make(chan error, 1)
	wg.Go(func() {
		err := pass(guest, host)
		if err != nil {
			guest.Close() // the server answers by closing its end, which ends the other direction
		}
		out <- err
	})
	err := pass(host, &orBroken{guest, s})
	if err != nil {
		guest.Close()
		reset(host)
	}
	if err = errors.Join(err, <-out); err != nil {
		reset(host)
	}
	guest.Close()
	host.Close()
	close(over)
	wg.Wait()
}

// orBroken has no end of file for a connection whose session broke.
type orBroken struct {
	io.Reader
	session *session
}

func (r *orBroken) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err == io.EOF && r.session.over() {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// pass carries one direction, and its end.
func pass(to net.Conn, from io.Reader) error {
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	if c, ok := to.(interface{ CloseWrite() error }); ok {
		c.CloseWrite() // fails where the other end has closed: it has read all that it wanted, and may have sent all
	}
	return nil
}
