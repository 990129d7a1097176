package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/usernet/usernet/driver/gvproxy"
)

// sshTimes are how long things by SSH may take.
type sshTimes struct {
	wait    time.Duration // for a client until it is connected: the machine may be booting
	attempt time.Duration // to connect to the server and log in, once
	probe   time.Duration // between questions whether the server is there
	silence time.Duration // without an answer to one, until the server counts as gone
}

// tunnel leads to a unix socket in a machine through its SSH server. All clients share one session with it, which is made
// when one waits for it, and again when it broke.
type tunnel struct {
	server server
	path   string
	times  sshTimes
	log    *slog.Logger

	wanted  chan struct{} // holds one if a client waits for a session
	waiting chan struct{} // holds one for each client that waits

	mu      sync.Mutex
	session *session      // nil: none
	err     error         // why there is none
	changed chan struct{} // closed when that is looked at again
}

func newTunnel(f gvproxy.Forward, n Network, l limits, log *slog.Logger) (*tunnel, error) {
	signer, err := readKey(f.SSH.KeyFile, f.SSH.Passphrase)
	if err != nil {
		return nil, err
	}
	return &tunnel{
		server:  server{network: n, addr: f.Target, user: f.SSH.User, signer: signer},
		path:    f.SSH.Path,
		times:   l.ssh,
		log:     log,
		wanted:  make(chan struct{}, 1),
		waiting: make(chan struct{}, l.waiting),
		changed: make(chan struct{}),
	}, nil
}

// run keeps a session with the server while there is one, and makes one when it is wanted, until ctx is done.
func (t *tunnel) run(ctx context.Context) {
	var (
		p    pause
		said string // of the last error
	)
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wanted:
		}
		s, err := t.server.connect(ctx, t.times.attempt)
		t.set(s, err)
		if err != nil {
			if text := err.Error(); text != said && ctx.Err() == nil {
				said = text
				t.log.Warn("no ssh session yet", "server", t.server.addr, "err", err)
			}
			p.wait(ctx)
			continue
		}
		said = ""
		p.reset()
		t.log.Info("ssh session", "server", t.server.addr, "user", t.server.user)
		s.keep(ctx, t.times)
		t.set(nil, net.ErrClosed)
		if ctx.Err() == nil {
			t.log.Warn("the ssh session broke", "server", t.server.addr)
		}
	}
}

// set tells those who wait what has become of the session.
func (t *tunnel) set(s *session, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.session, t.err = s, err
	close(t.changed)
	t.changed = make(chan struct{})
}

// await returns a session that is not broken as far as is known, when there is one, and asks for one until ctx is done or
// another server is found in its place.
func (t *tunnel) await(ctx context.Context) (*session, error) {
	for asked := false; ; asked = true {
		t.mu.Lock()
		s, err, changed := t.session, t.err, t.changed
		t.mu.Unlock()
		if s != nil && !s.over() {
			return s, nil
		}
		if asked && errors.Is(err, errOtherKey) {
			return nil, err
		}
		select {
		case t.wanted <- struct{}{}:
		default:
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if err == nil {
				err = context.Cause(ctx)
			}
			return nil, err
		}
	}
}

// dial returns a connection to the socket, and its session. One that broke meanwhile is waited for again.
func (t *tunnel) dial(ctx context.Context) (net.Conn, *session, error) {
	select {
	case t.waiting <- struct{}{}:
		defer func() { <-t.waiting }()
	default:
		return nil, nil, fmt.Errorf("%d clients wait already", cap(t.waiting))
	}
	ctx, cancel := context.WithTimeout(ctx, t.times.wait)
	defer cancel()
	for {
		s, err := t.await(ctx)
		if err != nil {
			return nil, nil, err
		}
		conn, err := s.client.DialContext(ctx, "unix", t.path)
		if err == nil {
			return conn, s, nil
		}
		if _, refused := errors.AsType[*ssh.OpenChannelError](err); refused || ctx.Err() != nil {
			return nil, nil, err
		}
		select {
		case <-s.done:
		case <-ctx.Done():
			return nil, nil, err
		}
	}
}

// join is a forward's join.
func (t *tunnel) join(ctx context.Context, host net.Conn, _ netip.AddrPort) error {
	conn, s, err := t.dial(ctx)
	if err != nil {
		reset(host)
		return fmt.Errorf("ssh to %s, %s: %w", t.server.addr, t.path, err)
	}
	s.relay(host, conn)
	return nil
}
