package flows

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet/internal/icmperror"
)

const (
	// Echo requests without an answer yet, and how long one may take.
	maxEchoes       = 4096
	maxClientEchoes = 512
	echoTimeout     = 15 * time.Second
)

// ping is an echo request of a guest.
type ping struct {
	client, dst netip.Addr
	hops        uint8
	whole       bool
	header      []byte // IP
	message     []byte // ICMP
}

// echoSocket carries the echo requests of one IP version on: each is sent to its destination by a socket of the host, and
// the reply or the error that comes of it, if any does, is sent on to the guest. One socket serves everybody; it is opened
// when it is first needed, since not every process may have one. All requests have the same identifier; the sequence
// number tells them apart.
type echoSocket struct {
	*Flows
	v4       bool
	waiting  *quota
	patience time.Duration // echoTimeout
	refused  atomic.Uint64 // requests that were not sent

	mu     sync.Mutex
	tried  bool    // to open it
	socket *pinger // nil: there is none
	next   uint16
	asked  map[uint16]echo

	sending sync.Mutex // one request at a time, since all have the same options
	path    pathOptions
	message []byte
}

// echo is a request that was sent.
type echo struct {
	client, dialled netip.Addr
	id, seq         uint16     // the guest's
	host            netip.Addr // whom it was sent to
	sent            time.Duration
}

func newEchoSocket(f *Flows, v4 bool, waiting *quota) *echoSocket {
	return &echoSocket{Flows: f, v4: v4, waiting: waiting, patience: echoTimeout, asked: make(map[uint16]echo)}
}

// close closes the socket and forgets all requests.
func (s *echoSocket) close() error {
	s.mu.Lock()
	socket := s.socket
	s.tried, s.socket = true, nil
	for seq, e := range s.asked {
		s.forgetLocked(seq, e)
	}
	s.mu.Unlock()
	if socket == nil {
		return nil
	}
	return socket.close()
}

// available opens the socket when it is first used, and returns it; nil: there is none.
func (s *echoSocket) available() *pinger {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.tried {
		s.tried = true
		p, err := openPinger(s)
		if errors.Is(err, errEnded) {
			s.tried = false // Run has not begun
		} else if err != nil {
			s.cfg.Log.Warn("guests cannot ping", "ipv6", !s.v4, "err", err)
		}
		s.socket = p
	}
	return s.socket
}

// forward sends an echo request to its destination.
func (s *echoSocket) forward(p *ping) {
	if len(p.message) < icmpHdrLen || p.message[0] != s.requestType() || p.message[1] != 0 ||
		p.client.Is4() != s.v4 || icmpSum(p.message, p.client, p.dst) != 0xffff {
		s.refused.Add(1)
		return
	}
	host, ok := s.cfg.Resolve(p.dst)
	if !ok || host.Is4() != s.v4 {
		s.refused.Add(1)
		s.reject(icmperror.Prohibited(s.v4), p)
		return
	}
	socket := s.available()
	if socket == nil {
		s.refused.Add(1)
		return
	}
	e := echo{
		client: p.client, dialled: p.dst, host: host, sent: s.now(),
		id: binary.BigEndian.Uint16(p.message[4:]), seq: binary.BigEndian.Uint16(p.message[6:]),
	}
	seq, ok := s.register(e)
	if !ok {
		s.refused.Add(1)
		return
	}
	if told, err := s.send(socket, p, seq, host); err != nil {
		s.refused.Add(1)
		s.take(seq, host)
		if told.Type != 0 {
			s.reject(told, p)
		}
	}
}

// send sends p with our identifier and seq. Where that fails, told is what the guest is to know of it, if anything.
func (s *echoSocket) send(to *pinger, p *ping, seq uint16, host netip.Addr) (told icmperror.Message, err error) {
	s.sending.Lock()
	defer s.sending.Unlock()
	s.message = append(s.message[:0], p.message...)
	binary.BigEndian.PutUint16(s.message[2:], 0)
	binary.BigEndian.PutUint16(s.message[4:], to.ident)
	binary.BigEndian.PutUint16(s.message[6:], seq)
	if s.v4 { // the kernel makes the other one's checksum
		binary.BigEndian.PutUint16(s.message[2:], ^sum(s.message, 0))
	}
	return to.send(host, pathOptions{p.hops, p.whole}, s.message)
}

func (s *echoSocket) reject(e icmperror.Message, p *ping) {
	s.report(e, p.client, p.dst, p.header, p.message)
}

// Both versions have the same message under different types.

func (s *echoSocket) requestType() byte {
	if s.v4 {
		return echoRequest4
	}
	return echoRequest6
}

func (s *echoSocket) replyType() byte {
	if s.v4 {
		return echoReply4
	}
	return echoReply6
}

// register gives e a sequence number, unless too many requests are without an answer.
func (s *echoSocket) register(e echo) (seq uint16, ok bool) {
	if !s.waiting.take(e.client) {
		return 0, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for { // ends: maxEchoes is less than there are numbers
		s.next++
		if _, taken := s.asked[s.next]; !taken {
			break
		}
	}
	s.asked[s.next] = e
	return s.next, true
}

// sweep forgets what has not been answered in time.
func (s *echoSocket) sweep() {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for seq, e := range s.asked {
		if now-e.sent > s.patience {
			s.forgetLocked(seq, e)
		}
	}
}

func (s *echoSocket) forgetLocked(seq uint16, e echo) {
	delete(s.asked, seq)
	s.waiting.put(e.client)
}

// take finds the request with seq that was sent to host, and forgets it.
func (s *echoSocket) take(seq uint16, host netip.Addr) (echo, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.asked[seq]
	if !ok || e.host.WithZone("") != host.Unmap().WithZone("") {
		return echo{}, false
	}
	s.forgetLocked(seq, e)
	return e, true
}

// answer sends a message that came from a host on to the guest that it is for: a reply, or (of sockets that have errors
// among their messages) an error. The message is changed.
func (s *echoSocket) answer(m []byte, ident uint16, from netip.Addr) {
	if len(m) < icmpHdrLen {
		return
	}
	if m[0] != s.replyType() {
		if e, q, ok := parseError(s.v4, m); ok && q.ident == ident {
			e.From = from.Unmap().WithZone("")
			s.fail(e, q)
		}
		return
	}
	if m[1] != 0 || binary.BigEndian.Uint16(m[4:]) != ident {
		return
	}
	e, ok := s.take(binary.BigEndian.Uint16(m[6:]), from)
	if !ok {
		return
	}
	binary.BigEndian.PutUint16(m[4:], e.id)
	binary.BigEndian.PutUint16(m[6:], e.seq)
	putSum(m, e.dialled, e.client)
	s.cfg.SendICMP(e.dialled, e.client, m)
}

// fail tells the guest of an error about the request that q quotes, which is changed.
func (s *echoSocket) fail(e icmperror.Message, q quotation) {
	sent, ok := s.take(q.seq, q.dst)
	if !ok {
		return
	}
	if !isShown(e.From) || e.From == sent.host {
		e.From = sent.dialled
	}
	// What kernels and programs look at is the addresses, the identifier and the sequence number.
	binary.BigEndian.PutUint16(q.message[4:], sent.id)
	binary.BigEndian.PutUint16(q.message[6:], sent.seq)
	putSum(q.message, sent.client, sent.dialled)
	proto := uint8(protoICMP6)
	if s.v4 {
		proto = protoICMP4
	}
	var b [ipv6HdrLen]byte
	n := putIP(b[:], proto, len(q.message), sent.client, sent.dialled)
	s.report(e, sent.client, sent.dialled, b[:n], q.message)
}
