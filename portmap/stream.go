package portmap

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
	"github.com/usernet/usernet/vsock/proxy"
	"github.com/usernet/usernet/vsock/publish"
)

// Accept relays a client that somebody else has accepted for this port: the host of the virtual machine that this is. h tells
// whose connection it is and which of the host's addresses was dialled; the stream must be one of package publish's, and is Accept's
// from now on. It does not wait, and is a publish.Handler. The client counts like any other, also against the limits.
func (f *Forward) Accept(h proxy.Header, stream net.Conn) {
	if h.Datagram {
		f.acceptFlow(h, stream)
		return
	}
	var client client = streamed{f, stream}
	if fd, ok := publish.Descriptor(stream); ok {
		stream.Close()
		client = spliced(fd)
	}
	if f.counters.active.Add(1) > int64(f.server.limits.conns) {
		f.server.refuse(client, h.Client, errTooMany)
		return
	}
	f.server.serveClient(&f.served, client, h.Client, f.request.targets(h.Target.Addr()))
}

// streamed is a client by a stream that is more than a socket of the kernel's: goroutines relay it.
type streamed struct {
	forward *Forward
	stream  net.Conn
}

func (c streamed) join(_ *splice.Group, container int, done func()) {
	conn, err := fileConn(container)
	if err != nil {
		c.forward.server.log.Warn("lost a connection", "err", err)
		c.stream.Close()
		done()
		return
	}
	c.forward.streams.carry(c.stream, conn, publish.Relay, done)
}

func (c streamed) refuse() { c.stream.Close() }

// fileConn is a connection by fd, which is its own from now on.
func fileConn(fd int) (net.Conn, error) {
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("connection of a socket: %w", err)
	}
	return conn, nil
}

// acceptFlow is Accept for UDP.
func (f *Forward) acceptFlow(h proxy.Header, stream net.Conn) {
	socket, err := f.dialFlow(h)
	if err == nil && f.counters.active.Add(1) > int64(f.server.limits.flows) {
		f.counters.active.Add(-1)
		socket.Close()
		err = errTooMany
	}
	if err != nil {
		stream.Close()
		f.counters.refused.Add(1)
		f.server.log.Debug("refused a flow", "client", h.Client, "err", err)
		return
	}
	f.counters.accepted.Add(1)
	f.streams.carry(stream, socket, publish.CarryDatagrams, func() { f.counters.active.Add(-1) })
}

// dialFlow is a connection to the container for the datagrams of one client.
func (f *Forward) dialFlow(h proxy.Header) (net.Conn, error) {
	fd, err := f.server.dialer.DialUDP(h.Client, f.request.targets(h.Target.Addr())[0])
	if err != nil {
		return nil, err
	}
	roomy(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, flowBuffer)
	return fileConn(fd)
}

// streams are the UDP flows of a forward that came by streams, and connections that cannot be spliced. The zero value is ready for use.
type streams struct {
	mu      sync.Mutex
	ctx     context.Context // nil before the first one
	stop    context.CancelFunc
	closed  bool
	running sync.WaitGroup
}

// carry has relay carry a flow or a connection, and calls done when it has ended.
func (s *streams) carry(stream, socket net.Conn, relay func(ctx context.Context, stream, socket net.Conn), done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		stream.Close()
		socket.Close()
		done()
		return
	}
	if s.ctx == nil {
		s.ctx, s.stop = context.WithCancel(context.Background())
	}
	s.running.Go(func() {
		defer done()
		relay(s.ctx, stream, socket)
	})
}

// close ends all of them, and returns when they have ended.
func (s *streams) close() {
	s.mu.Lock()
	s.closed = true
	if s.stop != nil {
		s.stop()
	}
	s.mu.Unlock()
	s.running.Wait()
}
