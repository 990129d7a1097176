package portmap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/vsock/proxy"
	"github.com/usernet/usernet/vsock/publish"
)

var errNoSocket = errors.New("the stream is no socket of the kernel's")

// Accept relays a client that somebody else has accepted for this port: the host of the virtual machine that this is. h tells
// whose connection it is and which of the host's addresses was dialled; the stream must be one of package vsock's, and is Accept's
// from now on. It does not wait, and is a publish.Handler. The client counts like any other, also against the limits.
func (f *Forward) Accept(h proxy.Header, stream net.Conn) {
	if h.Datagram {
		f.acceptFlow(h, stream)
		return
	}
	fd, ok := publish.Descriptor(stream)
	stream.Close()
	if !ok {
		f.counters.refused.Add(1)
		f.server.log.Warn("refused a connection", "client", h.Client, "err", errNoSocket)
		return
	}
	if f.counters.active.Add(1) > int64(f.server.limits.conns) {
		f.server.refuse(fd, h.Client, errTooMany)
		return
	}
	f.server.serveClient(&f.served, fd, h.Client, f.request.targets(h.Target.Addr()))
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
	f.streams.carry(stream, socket, func() { f.counters.active.Add(-1) })
}

// dialFlow is a connection to the container for the datagrams of one client.
func (f *Forward) dialFlow(h proxy.Header) (net.Conn, error) {
	fd, err := f.server.dialer.DialUDP(h.Client, f.request.targets(h.Target.Addr())[0])
	if err != nil {
		return nil, err
	}
	roomy(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, flowBuffer)
	file := os.NewFile(uintptr(fd), "udp")
	defer file.Close()
	socket, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("datagram socket: %w", err)
	}
	return socket, nil
}

// datagramStreams are the UDP flows of a forward that came by streams. The zero value is ready for use.
type datagramStreams struct {
	mu      sync.Mutex
	ctx     context.Context // nil before the first flow
	stop    context.CancelFunc
	closed  bool
	running sync.WaitGroup
}

// carry relays a flow, and calls done when it has ended.
func (s *datagramStreams) carry(stream, socket net.Conn, done func()) {
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
		publish.CarryDatagrams(s.ctx, stream, socket)
	})
}

// close ends all flows, and returns when they have ended.
func (s *datagramStreams) close() {
	s.mu.Lock()
	s.closed = true
	if s.stop != nil {
		s.stop()
	}
	s.mu.Unlock()
	s.running.Wait()
}
