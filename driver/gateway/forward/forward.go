// Package forward is one forward of a gateway of virtual machines: what listens on the host (a TCP or UDP port, a unix
// socket, a named pipe), and the relay from there to an address of their network or, by SSH, to a unix socket in a machine.
// Which forwards there may be, and who asks for them, is the gateway's to decide.
package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
)

// Network is the machines' network, as forwards need it.
type Network interface {
	// JoinTCP dials to, and relays between it and host until both directions have ended, or ctx is done. It owns host. An
	// error says that to could not be reached; host was closed with a reset then. A client that is zero has no address.
	JoinTCP(ctx context.Context, host net.Conn, client, to netip.AddrPort) error
	// DialTCP dials to. ctx bounds the dialling only.
	DialTCP(ctx context.Context, client, to netip.AddrPort) (net.Conn, error)
	// DialUDP returns a socket connected to to, without waiting. If it is an io.WriterTo, that is how it is read: one Write
	// for each datagram, from memory that is not held while there is none.
	DialUDP(client, to netip.AddrPort) (net.Conn, error)
}

// Stats are the counters of a forward.
type Stats struct {
	Active   int64  // connections that are relayed or being made; UDP: flows
	Accepted uint64 // connections, UDP: flows, since it was opened
	Failed   uint64 // of these, such whose target could not be reached
	Refused  uint64 // connections that were reset because there were too many
}

// limits bound what the clients of one forward may use.
type limits struct {
	conns   int           // connections at a time
	waiting int           // of these, such that wait for an SSH server
	flows   int           // UDP flows at a time; one more ends the one that was idle for longest
	idle    time.Duration // a UDP flow ends this long after its last datagram
	ssh     sshTimes
}

// standard are the limits of a published port, see package portmap, where it has them.
var standard = limits{
	conns:   8192,
	waiting: 256,
	flows:   4096,
	idle:    90 * time.Second,
	ssh: sshTimes{
		wait:    2 * time.Minute,
		attempt: 20 * time.Second,
		probe:   10 * time.Second,
		silence: 20 * time.Second,
	},
}

// Forward is an open forward.
type Forward struct {
	log      *slog.Logger
	limits   limits
	counters struct {
		active                    atomic.Int64
		accepted, failed, refused atomic.Uint64
	}

	stop context.CancelFunc // ends what is relayed
	wg   sync.WaitGroup     // what Close joins
	shut func() error       // stops listening
	once sync.Once
	err  error // of the first Close
}

// Open listens on the host for f, and relays to n until Close. ctx bounds opening only. The error is for the client of the
// API: for a port that is taken it is what package net says, as in "listen tcp 127.0.0.1:8080: bind: address already in use".
//
// A unix socket takes the place of one that nobody answers on; another file is not touched. It and a named pipe are for the
// user of this process only. A forward by SSH needs its key at once; the server is called when the first client comes, and again
// for as long as clients wait. The server's key is taken on trust when it is first seen, and must be the same from then on.
func Open(ctx context.Context, f gvproxy.Forward, n Network, log *slog.Logger) (*Forward, error) {
	return open(ctx, f, n, log, standard)
}

func open(ctx context.Context, f gvproxy.Forward, n Network, log *slog.Logger, l limits) (*Forward, error) {
	running, stop := context.WithCancel(context.Background())
	fwd := &Forward{log: log.With("proto", f.Proto, "local", f.Local), limits: l, stop: stop}
	var err error
	if f.Proto == gvproxy.UDP {
		err = fwd.openUDP(ctx, running, f, n)
	} else {
		err = fwd.openStream(ctx, running, f, n)
	}
	if err != nil {
		stop()
		fwd.wg.Wait()
		return nil, err
	}
	return fwd, nil
}

// openStream listens and starts to accept, which goes on until running ends.
func (f *Forward) openStream(ctx, running context.Context, spec gvproxy.Forward, n Network) error {
	join := func(ctx context.Context, host net.Conn, client netip.AddrPort) error {
		return n.JoinTCP(ctx, host, client, spec.Target)
	}
	if spec.SSH != nil {
		t, err := newTunnel(spec, n, f.limits, f.log)
		if err != nil {
			return err
		}
		join = t.join
		f.wg.Go(func() { t.run(running) })
	}
	l, err := listen(ctx, spec.Key)
	if err != nil {
		return err
	}
	f.shut = l.Close
	f.wg.Go(func() { f.accept(running, l, join) })
	return nil
}

func listen(ctx context.Context, k gvproxy.Key) (net.Listener, error) {
	switch k.Proto {
	case gvproxy.TCP:
		// Multipath TCP, Go's default, is slower, and the kernel does not splice it.
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		return lc.Listen(ctx, "tcp", k.Local)
	case gvproxy.Unix:
		return listenUnix(k.Local)
	case gvproxy.NPipe:
		path, err := pipePath(k.Local)
		if err != nil {
			return nil, err
		}
		return listenPipe(path)
	}
	return nil, fmt.Errorf("unknown protocol %s", k.Proto)
}

// Close stops listening, ends what is relayed, and waits until all of it is gone. It may be called again.
func (f *Forward) Close() error {
	f.once.Do(func() {
		f.err = f.shut()
		if errors.Is(f.err, net.ErrClosed) {
			f.err = nil
		}
		f.stop()
		f.wg.Wait()
	})
	return f.err
}

// Stats returns the counters as they are now.
func (f *Forward) Stats() Stats {
	c := &f.counters
	return Stats{c.active.Load(), c.accepted.Load(), c.failed.Load(), c.refused.Load()}
}
