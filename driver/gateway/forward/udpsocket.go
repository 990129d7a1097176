package forward

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// socketBuffer is how many bytes may wait in a socket, where the system allows as many: all clients share one.
const socketBuffer = 4 << 20

// socket is a UDP socket of one family.
type socket struct {
	*net.UDPConn
	raw      syscall.RawConn
	v6       bool
	anywhere bool // it is bound to a wildcard, and asked for destinations
	drained  bool // there was nothing left to read

	control []byte // the last control message, and what it says
	local   local
}

// listenUDP binds HOST:PORT, or for a wildcard that port in each family that the host has: one socket for both would have
// to answer by control messages of the other family, which not every system takes.
func listenUDP(ctx context.Context, at string) (sockets []*socket, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll(sockets))
			sockets = nil
		}
	}()
	host, port, err := net.SplitHostPort(at)
	addr, _ := netip.ParseAddr(host)
	if err != nil || host != "" && !addr.IsUnspecified() {
		s, err := bindUDP(ctx, "udp", at)
		if err != nil {
			return nil, err
		}
		return []*socket{s}, nil
	}
	for _, family := range []string{"udp4", "udp6"} {
		s, e := bindUDP(ctx, family, ":"+port)
		if e == nil {
			sockets = append(sockets, s)
			port = portOf(s)
			continue
		}
		err = errors.Join(err, e)
		if !slices.ContainsFunc(noFamily, func(none error) bool { return errors.Is(e, none) }) {
			return sockets, e
		}
	}
	if len(sockets) > 0 {
		err = nil
	}
	return sockets, err
}

func portOf(s *socket) string {
	_, port, _ := net.SplitHostPort(s.LocalAddr().String())
	return port
}

func bindUDP(ctx context.Context, network, at string) (*socket, error) {
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(ctx, network, at)
	if err != nil {
		if op, ok := err.(*net.OpError); ok {
			op.Net = "udp" // as for a socket of both families
		}
		return nil, err
	}
	s, err := newSocket(pc.(*net.UDPConn))
	if err != nil {
		return nil, errors.Join(err, pc.Close())
	}
	return s, nil
}

func newSocket(conn *net.UDPConn) (*socket, error) {
	at := addrPort(conn.LocalAddr())
	s := &socket{UDPConn: conn, drained: true, v6: at.Addr().Is6(), anywhere: at.Addr().IsUnspecified()}
	conn.SetReadBuffer(socketBuffer) // macOS refuses what is more than it allows
	conn.SetWriteBuffer(socketBuffer)
	var err error
	if s.raw, err = conn.SyscallConn(); err != nil || !s.anywhere || runtime.GOOS == "windows" {
		return s, err // x/net has no control messages on Windows
	}
	if s.v6 {
		err = ipv6.NewPacketConn(conn).SetControlMessage(ipv6.FlagDst|ipv6.FlagInterface, true)
	} else {
		err = ipv4.NewPacketConn(conn).SetControlMessage(ipv4.FlagDst, true)
	}
	return s, err
}

func closeAll(sockets []*socket) error {
	var errs []error
	for _, s := range sockets {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// destination is what a control message says where a datagram went to. It is zero if the socket has one address only, or the
// system does not tell. It returns false for what was not for this host alone.
func (s *socket) destination(control []byte) (local, bool) {
	if !s.anywhere {
		return local{}, true
	}
	if !bytes.Equal(control, s.control) {
		s.control = append(s.control[:0], control...)
		s.local = parseDestination(s.v6, control)
	}
	a := s.local.addr
	return s.local, !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func parseDestination(v6 bool, control []byte) local {
	var (
		ip    net.IP
		index int
	)
	if v6 {
		var m ipv6.ControlMessage
		if m.Parse(control) == nil {
			ip, index = m.Dst, m.IfIndex
		}
	} else {
		var m ipv4.ControlMessage
		if m.Parse(control) == nil {
			ip = m.Dst
		}
	}
	addr, _ := netip.AddrFromSlice(ip)
	if !v6 {
		addr = addr.Unmap()
	}
	if !addr.IsLinkLocalUnicast() {
		index = 0
	}
	return local{addr, index}
}

// source is the control message by which datagrams leave from an address; nil: from one of the system's choice.
func (s *socket) source(from local) []byte {
	switch {
	case !from.addr.IsValid():
		return nil
	case s.v6:
		m := ipv6.ControlMessage{Src: from.addr.AsSlice(), IfIndex: from.index}
		return m.Marshal()
	}
	m := ipv4.ControlMessage{Src: from.addr.AsSlice()}
	return m.Marshal()
}

// controlSize has room for what is asked for, of either family, in bytes.
const controlSize = 128

// batch is memory for datagrams.
type batch struct{ messages []ipv4.Message }

func newBatch() *batch {
	size := 1
	if runtime.GOOS == "linux" { // the one that has recvmmsg(2)
		size = 16
	}
	b := &batch{messages: make([]ipv4.Message, size)}
	for i := range b.messages {
		b.messages[i].Buffers = [][]byte{make([]byte, maxDatagram)}
		b.messages[i].OOB = make([]byte, controlSize)
	}
	return b
}
