package usermode

import (
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
)

// udpFlow is one flow.
type udpFlow struct {
	table *udpFlows
	key   flowKey
	fd    int // of a connected socket, non-blocking
	place int32
	path  pathOptions
	// single: several datagrams cannot be given to the kernel at once.
	single bool

	last     time.Time // when something was sent or received
	answered bool      // something was received

	client           *udpClient
	inClient, inList int // its places in client.flows and table.list
}

// dial makes the flow of key, with a socket that is connected to dst.
func (t *udpFlows) dial(key flowKey, dst netip.AddrPort) (_ *udpFlow, err error) {
	v4 := dst.Addr().Is4()
	family := unix.AF_INET6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
	if v4 {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(dst.Port()), Addr: dst.Addr().As4()}
	}
	// Not by package net, which would watch the socket as well, and let it connect to broadcast addresses.
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := icmperror.Ask(fd, v4); err != nil {
		return nil, err
	}
	roomy(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, flowBuffer)
	if err := unix.Connect(fd, sa); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	f := &udpFlow{table: t, key: key, fd: fd, last: time.Now()}
	f.place, err = t.poller.add(fd, f)
	return f, err
}

// send sends a datagram to the host's side. It does not wait: a full socket buffer loses datagrams, as a full queue
// does on any path.
func (f *udpFlow) send(d *datagram) {
	v4 := f.key.dst.Addr().Is4()
	f.path.set(f.fd, v4, d.hops, d.whole)
	for try := range 3 {
		err := write(f.fd, &d.payload)
		if err == nil {
			return
		}
		if err == unix.EAGAIN || err == unix.ENOBUFS {
			break
		}
		// Most errors belong to an earlier datagram, and this one has not been sent.
		if mtu := f.readErrors(); mtu > 0 && err == unix.EMSGSIZE {
			f.reject(icmperror.TooBig(v4, mtu), d.payload[0])
			break
		}
		if try == 2 && (err == unix.ENETUNREACH || err == unix.EHOSTUNREACH) {
			f.reject(icmperror.HostUnreachable(v4), d.payload[0]) // the route has gone
		}
	}
	f.table.dropped.Add(1)
}

// sendAgain sends a datagram of which only the payload is left.
func (f *udpFlow) sendAgain(payload []byte, hops uint8, whole bool) {
	f.send(&datagram{client: f.key.client, dst: f.key.dst, hops: hops, whole: whole, payload: [2][]byte{payload, nil}})
}

// readErrors sends the errors that wait in the socket's queue to the container. Where one is that a datagram was too
// long for the way to its destination and did not leave the host, it returns that way's MTU.
func (f *udpFlow) readErrors() (mtu uint32) {
	for {
		e, more := f.table.queue.Read(f.fd)
		if !more {
			return mtu
		}
		if e.Local {
			mtu = e.MTU
			continue
		}
		f.reject(e.Message, e.Quoted)
	}
}

// reject tells the container of an error about a datagram that began with payload. The packet itself is gone; what
// programs and kernels look at is its addresses and its UDP header, and from those it is made again.
func (f *udpFlow) reject(e icmperror.Message, payload []byte) {
	var quote [headroom + maxError6]byte
	b := quote[:headroom+copy(quote[headroom:], payload)]
	frame := putUDP(b, f.key.client, f.key.dst, 0, false)
	f.table.report(e, f.key.client.Addr(), f.key.dst.Addr(), frame[virtioHdrLen:])
}

// ready carries what the host's side sends to the container.
func (f *udpFlow) ready() {
	t := f.table
	in := t.inbox()
	n, err := in.receive(f.fd)
	if err != nil {
		f.readErrors()
		return
	}
	f.last, f.answered = time.Now(), true
	for i := range n {
		b := in.datagram(i)
		if frame := putUDP(b, f.key.dst, f.key.client, t.nextID(), t.link.offload); t.fits(frame) {
			t.inject(frame)
		} else {
			t.deliverCut(f, b[headroom:])
		}
	}
}
