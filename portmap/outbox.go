package portmap

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// maxBurst is how many bytes one message with UDP_SEGMENT may carry: without the headers of IPv4 and UDP.
const maxBurst = 65535 - 20 - 8

// route is where an outbox sends to.
type route struct {
	fd     int
	name   []byte // struct sockaddr of the destination; nil: the socket is connected
	source []byte // control message that tells which address to leave from; nil: the socket has but one
	single bool   // it does not take several datagrams at once
}

// outbox collects datagrams that take one route, and gives them to the kernel together. Equally long ones that follow each
// other become a burst, which the kernel takes as one, and cuts at the end of its way through it.
type outbox struct {
	route  *route
	n      int // pieces
	pieces [batchSize]piece

	bursts   [batchSize]burst
	headers  [batchSize]nonblock.Message
	iovecs   [batchSize]unix.Iovec // one for each piece
	controls [batchSize][controlSpace]byte
}

// piece is one datagram, or several, each but for the last with segment bytes.
type piece struct {
	b       []byte
	segment int
}

// burst is one message to be sent.
type burst struct {
	first    int // piece
	pieces   int
	segment  int // bytes of each datagram; the last may be shorter
	segments int // datagrams
	size     int // bytes
}

// open begins with datagrams for r.
func (o *outbox) open(r *route) { o.route, o.n = r, 0 }

// add takes a message as an inbox has it. The bytes have to stay until flush.
func (o *outbox) add(b []byte, segment int) {
	if o.route.single {
		for ; len(b) > segment; b = b[segment:] {
			o.push(piece{b[:segment], segment})
		}
		segment = len(b)
	}
	o.push(piece{b, segment})
}

func (o *outbox) push(p piece) {
	if o.n == batchSize {
		o.flush()
	}
	o.pieces[o.n] = p
	o.n++
}

// flush sends what has been collected. What does not fit or cannot be routed is lost, as on any network.
func (o *outbox) flush() {
	if o.n == 0 {
		return
	}
	count := o.arrange()
	for sent, again := 0, false; sent < count; {
		n, err := nonblock.Sendmmsg(o.route.fd, o.headers[sent:count])
		switch {
		case err == nil:
			sent, again = sent+n, false
		case err == unix.EAGAIN || err == unix.ENOBUFS:
			sent = count
		case o.bursts[sent].segments > 1 && uncut(err):
			o.flushSingly(o.bursts[sent].first)
			return
		case !again:
			// It may be the ICMP answer to an earlier datagram, and this one has not been sent then.
			again = true
		default:
			sent, again = sent+1, false
		}
	}
	o.n = 0
}

// uncut tells whether a burst failed because it was one: its datagrams are longer than the way is wide, or the way has no
// checksums.
func uncut(err error) bool {
	return err == unix.EINVAL || err == unix.EIO || err == unix.EMSGSIZE
}

// flushSingly sends the pieces from first on, and all that take this route from now on, one datagram a message.
func (o *outbox) flushSingly(first int) {
	pieces := o.pieces
	rest := pieces[first:o.n]
	o.route.single, o.n = true, 0
	for _, p := range rest {
		o.add(p.b, p.segment)
	}
	o.flush()
}

// arrange makes bursts of the pieces, and a header for each.
func (o *outbox) arrange() (bursts int) {
	for i, p := range o.pieces[:o.n] {
		o.iovecs[i].Base = unsafe.SliceData(p.b)
		o.iovecs[i].SetLen(len(p.b))
		if bursts > 0 && !o.route.single && o.bursts[bursts-1].take(p) {
			continue
		}
		o.bursts[bursts] = burst{first: i, pieces: 1, segment: p.segment, segments: p.segments(), size: len(p.b)}
		bursts++
	}
	for i := range bursts {
		o.head(i)
	}
	return bursts
}

// segments is how many datagrams p is.
func (p piece) segments() int {
	if p.segment >= len(p.b) {
		return 1
	}
	return (len(p.b) + p.segment - 1) / p.segment
}

// take adds p to the burst, unless it does not fit.
func (u *burst) take(p piece) bool {
	n := p.segments()
	switch {
	case len(p.b) == 0 || u.size < u.segments*u.segment || u.size == 0: // an empty one, or one after a shorter one
		return false
	case p.segment > u.segment || p.segment < u.segment && n > 1:
		return false
	case u.segments+n > nonblock.MaxSegments || u.size+len(p.b) > maxBurst:
		return false
	}
	u.pieces++
	u.segments += n
	u.size += len(p.b)
	return true
}

// head makes the header of the i-th burst.
func (o *outbox) head(i int) {
	h, u, control := &o.headers[i].Hdr, &o.bursts[i], &o.controls[i]
	h.Name, h.Namelen = unsafe.SliceData(o.route.name), uint32(len(o.route.name))
	h.Iov = &o.iovecs[u.first]
	h.SetIovlen(u.pieces)
	length := copy(control[:], o.route.source)
	if u.segments > 1 {
		c := (*unix.Cmsghdr)(unsafe.Pointer(&control[length]))
		c.Level, c.Type = unix.SOL_UDP, unix.UDP_SEGMENT
		c.SetLen(unix.CmsgLen(2))
		binary.NativeEndian.PutUint16(control[length+unix.CmsgLen(0):], uint16(u.segment))
		length += unix.CmsgSpace(2)
	}
	h.Control = &control[0]
	h.SetControllen(length)
}
