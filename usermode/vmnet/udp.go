package vmnet

import (
	"encoding/binary"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// UDP sockets inside the network do without netstack: Deliver has decoded what comes for them, and a datagram is easily sent.

const (
	udpQueue = 256  // datagrams that wait to be read
	maxPeers = 1024 // of a listener, that have asked at another address than the gateway's
	// firstPort and lastPort are where ports are chosen from (RFC 6335, 6).
	firstPort, lastPort = 49152, 65535
)

// udpTable finds the socket of a datagram. It must not be copied.
type udpTable struct {
	listeners atomic.Pointer[map[uint16]*udpSocket] // by port; never changed, but replaced

	connections atomic.Int64
	shards      [32]udpShard // by the machine's address
	mu          sync.Mutex   // for a change of listeners
	next        uint16
}

type udpShard struct {
	mu sync.RWMutex
	m  map[udpRoute]*udpSocket
}

// udpRoute is a connected socket's addresses.
type udpRoute struct{ machine, local netip.AddrPort }

func (t *udpTable) init() {
	t.listeners.Store(&map[uint16]*udpSocket{})
	for i := range t.shards {
		t.shards[i].m = make(map[udpRoute]*udpSocket)
	}
}

func (t *udpTable) shard(machine netip.Addr) *udpShard {
	b := machine.As16()
	return &t.shards[b[15]%uint8(len(t.shards))]
}

func (t *udpTable) connected(r udpRoute) *udpSocket {
	if t.connections.Load() == 0 {
		return nil
	}
	sh := t.shard(r.machine.Addr())
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	return sh.m[r]
}

// deliver gives a datagram to its socket, if there is one. Only listeners hear what is to an address of the gateway's: local.
func (t *udpTable) deliver(from, to netip.AddrPort, local bool, payload []byte) bool {
	s := t.connected(udpRoute{from, to})
	if s == nil && local {
		s = (*t.listeners.Load())[to.Port()]
	}
	if s == nil {
		return false
	}
	s.receive(datagram{from: from, to: to, payload: append([]byte(nil), payload...)})
	return true
}

// unreachable tells a connected socket that the machine has refused its datagram, of which quoted is the beginning.
func (t *udpTable) unreachable(quoted []byte) {
	var p packet
	frame := append(make([]byte, ethLen, ethLen+len(quoted)), quoted...)
	l4, proto := ethLen+ipv6Len, byte(0)
	if quoted[0]>>4 == 4 {
		l4, proto = ethLen+4*int(quoted[0]&15), quoted[9]
		p.src, p.dst = netip.AddrFrom4([4]byte(quoted[12:])), netip.AddrFrom4([4]byte(quoted[16:]))
	} else {
		proto = quoted[6]
		p.src, p.dst = netip.AddrFrom16([16]byte(quoted[8:])), netip.AddrFrom16([16]byte(quoted[24:]))
	}
	if proto != protoUDP || len(frame) < l4+4 {
		return
	}
	src, dst := binary.BigEndian.Uint16(frame[l4:]), binary.BigEndian.Uint16(frame[l4+2:])
	if s := t.connected(udpRoute{netip.AddrPortFrom(p.dst, dst), netip.AddrPortFrom(p.src, src)}); s != nil {
		s.receive(datagram{err: syscall.ECONNREFUSED})
	}
}

// listen makes s the socket of a port.
func (t *udpTable) listen(s *udpSocket) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := *t.listeners.Load()
	if old[s.local.Port()] != nil {
		return syscall.EADDRINUSE
	}
	ls := maps.Clone(old)
	ls[s.local.Port()] = s
	t.listeners.Store(&ls)
	return nil
}

// connect makes s the socket of what r says; port 0 is chosen.
func (t *udpTable) connect(s *udpSocket, r udpRoute) error {
	if r.local.Port() != 0 {
		return t.enter(s, r)
	}
	for range lastPort - firstPort {
		t.mu.Lock()
		t.next++
		port := firstPort + t.next%(lastPort-firstPort+1)
		t.mu.Unlock()
		r.local = netip.AddrPortFrom(r.local.Addr(), port)
		if err := t.enter(s, r); err != syscall.EADDRINUSE {
			return err
		}
	}
	return syscall.EADDRINUSE
}

func (t *udpTable) enter(s *udpSocket, r udpRoute) error {
	sh := t.shard(r.machine.Addr())
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.m[r] != nil {
		return syscall.EADDRINUSE
	}
	s.remote, s.local = r.machine, r.local
	sh.m[r] = s
	t.connections.Add(1)
	return nil
}

func (t *udpTable) remove(s *udpSocket) {
	if !s.remote.IsValid() {
		t.mu.Lock()
		defer t.mu.Unlock()
		ls := maps.Clone(*t.listeners.Load())
		delete(ls, s.local.Port())
		t.listeners.Store(&ls)
		return
	}
	sh := t.shard(s.remote.Addr())
	sh.mu.Lock()
	defer sh.mu.Unlock()
	delete(sh.m, udpRoute{s.remote, s.local})
	t.connections.Add(-1)
}

// datagram is one that has come, or an error.
type datagram struct {
	from, to netip.AddrPort
	payload  []byte
	err      error
}

// udpSocket is a udpConn if it is connected, and else a udpListener, of a port at all of the gateway's addresses.
type udpSocket struct {
	n             *Network
	local, remote netip.AddrPort // remote is not valid: a listener
	in            chan datagram
	closed        chan struct{}
	once          sync.Once
	read          deadline

	mu    sync.Mutex
	asked map[netip.AddrPort]netip.Addr // at which address, if not at the gateway's of that family
}

func newUDPSocket(n *Network) *udpSocket {
	return &udpSocket{n: n, in: make(chan datagram, udpQueue), closed: make(chan struct{}), asked: make(map[netip.AddrPort]netip.Addr)}
}

func (s *udpSocket) receive(d datagram) {
	select {
	case s.in <- d:
	default: // as with any socket's buffer
	}
}

// next waits for a datagram.
func (s *udpSocket) next() (datagram, error) {
	select {
	case <-s.closed:
		return datagram{}, net.ErrClosed
	case <-s.read.passed():
		return datagram{}, os.ErrDeadlineExceeded
	default:
	}
	select {
	case d := <-s.in:
		return d, d.err
	case <-s.closed:
		return datagram{}, net.ErrClosed
	case <-s.read.passed():
		return datagram{}, os.ErrDeadlineExceeded
	}
}

func (s *udpSocket) error(op string, err error) error {
	if err == nil {
		return nil
	}
	return &net.OpError{Op: op, Net: "udp", Addr: s.LocalAddr(), Err: err}
}

// udpConn is what DialUDP returns.
type udpConn struct{ *udpSocket }

// Read reads the next datagram, or as much of it as there is room for.
func (s udpConn) Read(b []byte) (int, error) {
	d, err := s.next()
	return copy(b, d.payload), s.error("read", err)
}

// WriteTo writes datagrams to w as they come.
func (s udpConn) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		d, err := s.next()
		if err != nil {
			return total, s.error("read", err)
		}
		n, err := w.Write(d.payload)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// Write sends a datagram to the machine.
func (s udpConn) Write(b []byte) (int, error) { return s.write(b, s.local, s.remote) }

// udpListener is what ListenUDP returns.
type udpListener struct{ *udpSocket }

// ReadFrom reads the next datagram, or as much of it as there is room for, and tells its sender, a *net.UDPAddr.
func (s udpListener) ReadFrom(b []byte) (int, net.Addr, error) {
	d, err := s.next()
	if err != nil {
		return 0, nil, s.error("read", err)
	}
	s.remember(d.from, d.to.Addr())
	return copy(b, d.payload), net.UDPAddrFromAddrPort(d.from), nil
}

// remember notes at which address a machine has asked, if it is not the usual one.
func (s udpListener) remember(peer netip.AddrPort, at netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if at == s.n.addresses.gatewayFor(peer.Addr()) {
		delete(s.asked, peer)
		return
	}
	if len(s.asked) >= maxPeers {
		clear(s.asked)
	}
	s.asked[peer] = at
}

// WriteTo answers a machine, from the address at which it has asked last.
func (s udpListener) WriteTo(b []byte, addr net.Addr) (int, error) {
	ua, ok := addr.(*net.UDPAddr)
	if !ok {
		return 0, s.error("write", syscall.EINVAL)
	}
	to := ua.AddrPort()
	to = netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	if !s.n.addresses.isInside(to.Addr()) && !to.Addr().IsLinkLocalUnicast() {
		return 0, s.error("write", syscall.EHOSTUNREACH)
	}
	s.mu.Lock()
	from, ok := s.asked[to]
	s.mu.Unlock()
	if !ok {
		from = s.n.addresses.gatewayFor(to.Addr())
	}
	return s.write(b, netip.AddrPortFrom(from, s.local.Port()), to)
}

func (s *udpSocket) write(b []byte, from, to netip.AddrPort) (int, error) {
	select {
	case <-s.closed:
		return 0, s.error("write", net.ErrClosed)
	default:
	}
	if len(b) > maxPacket-ipv4Len-udpLen {
		return 0, s.error("write", syscall.EMSGSIZE)
	}
	s.n.sendUDP(from, to, [][]byte{b})
	return len(b), nil
}

// Close closes the socket.
func (s *udpSocket) Close() error {
	s.abort()
	s.n.remove(s)
	return nil
}

func (s *udpSocket) abort() {
	s.once.Do(func() {
		s.n.sockets.remove(s)
		close(s.closed)
		s.read.set(time.Time{})
	})
}

func (s *udpSocket) LocalAddr() net.Addr                { return net.UDPAddrFromAddrPort(s.local) }
func (s *udpSocket) RemoteAddr() net.Addr               { return net.UDPAddrFromAddrPort(s.remote) }
func (s *udpSocket) SetReadDeadline(t time.Time) error  { s.read.set(t); return nil }
func (s *udpSocket) SetWriteDeadline(t time.Time) error { return nil } // nothing waits
func (s *udpSocket) SetDeadline(t time.Time) error      { return s.SetReadDeadline(t) }

var (
	_ net.Conn       = udpConn{}
	_ io.WriterTo    = udpConn{}
	_ net.PacketConn = udpListener{}
)
