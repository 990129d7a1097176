//go:build !linux

package flows

import (
	"context"
	"errors"
	"net"
	"sync"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/usernet/usernet/internal/icmperror"
)

const (
	maxDatagram = 65535   // bytes, more than any
	flowBuffer  = 1 << 18 // bytes that may wait in a flow's socket for us
)

// pollers are the runtime's own, which has a goroutine for each flow.
type pollers struct{}

func (*pollers) open(*Flows) error { return nil }
func (*pollers) close() error      { return nil }

// task runs do beside Run, which waits for it. It returns false when Run has ended, or not begun.
func (f *Flows) task(do func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running {
		f.tasks.Go(do)
	}
	return f.running
}

// buffers are for one datagram each, while there is one: a flow that waits has none.
var buffers = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// socket is a flow's.
type socket struct{ conn *net.UDPConn }

// dial opens the flow's socket.
func (f *udpFlow) dial() (err error) {
	network := "udp6"
	if f.host.Addr().Is4() {
		network = "udp4"
	}
	d := net.Dialer{Control: noBroadcast}
	f.conn, err = d.DialUDP(context.Background(), network, anyPort, f.host)
	if err == nil {
		f.conn.SetReadBuffer(flowBuffer) // as much as the system allows
	}
	return err
}

// watch has the flow's datagrams received from now on.
func (f *udpFlow) watch() bool { return f.table.task(f.receive) }

// close ends the flow's goroutine.
func (f *udpFlow) close() { f.conn.Close() }

// send sends a burst to the host's side, and returns how many of its datagrams were lost; false: the flow has ended. Room in
// the socket's buffer is waited for, which is not long.
func (f *udpFlow) send(b *burst) (lost int, ok bool) {
	f.sending.Lock()
	defer f.sending.Unlock()
	if f.path.hops != b.hops && b.hops > 0 {
		// Where the system has no such option, it sends with its own.
		if f.host.Addr().Is4() {
			ipv4.NewConn(f.conn).SetTTL(int(b.hops))
		} else {
			ipv6.NewConn(f.conn).SetHopLimit(int(b.hops))
		}
		f.path.hops = b.hops
	}
	for i, p := range b.payloads {
		switch err := f.sendOne(b, p); {
		case err == nil:
		case errors.Is(err, net.ErrClosed):
			return lost + len(b.payloads) - i, i > 0 // nothing is sent twice
		default:
			lost++
		}
	}
	return lost, true
}

// sendOne sends a datagram of a burst.
func (f *udpFlow) sendOne(b *burst, payload []byte) error {
	_, err := f.conn.Write(payload)
	v4 := f.host.Addr().Is4()
	switch {
	case err == nil:
	case isRefused(err): // an earlier datagram was, and this one has not been sent
		f.reject(icmperror.PortUnreachable(v4), nil)
		_, err = f.conn.Write(payload)
	case isUnreachable(err):
		f.table.reject(icmperror.HostUnreachable(v4), b, payload)
	}
	return err
}

// receive carries what the host's side sends to the guest, until the flow ends.
func (f *udpFlow) receive() {
	defer f.table.end(f)
	for {
		err := f.receiveSome()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case isRefused(err):
			f.reject(icmperror.PortUnreachable(f.host.Addr().Is4()), nil)
		case isUnreachable(err):
			f.reject(icmperror.HostUnreachable(f.host.Addr().Is4()), nil)
		case err != nil:
			f.table.cfg.Log.Debug("a UDP flow ends", "client", f.key.client.Addr(), "dst", f.key.dst, "err", err)
			return
		}
	}
}

// received carries one datagram on.
func (f *udpFlow) received(payload []byte) {
	f.touch()
	f.deliver([][]byte{payload})
}
