package dns

import (
	"encoding/binary"
	"errors"

	miekg "github.com/miekg/dns"
)

// Messages stay bytes here: what comes from upstream goes to the client as it was, whatever types and options it has.
// Offsets and flags are those of RFC 1035 section 4.1.1.
const (
	headerLen = 12

	flagQR = 1 << 15
	flagAA = 1 << 10
	flagTC = 1 << 9
	flagRD = 1 << 8
	flagRA = 1 << 7
	flagAD = 1 << 5
	flagCD = 1 << 4

	opcodeMask = 0xf << 11
	rcodeMask  = 0xf

	flagDO = 1 << 15 // in the TTL of OPT (RFC 6891 section 6.1.4)
)

var errFormat = errors.New("malformed message")

type transport bool

const (
	overUDP transport = false
	overTCP transport = true
)

func (t transport) network() string {
	if t == overTCP {
		return "tcp"
	}
	return "udp"
}

func u16(b []byte, off int) uint16 { return binary.BigEndian.Uint16(b[off:]) }
func u32(b []byte, off int) uint32 { return binary.BigEndian.Uint32(b[off:]) }

func put16(b []byte, off int, v uint16) { binary.BigEndian.PutUint16(b[off:], v) }

func flags(msg []byte) uint16 { return u16(msg, 2) }
func rcodeOf(msg []byte) int  { return int(flags(msg) & rcodeMask) }

// The sections of a message after the question, by their places in the header's counts.
const (
	inAnswer     = 1
	inAuthority  = 2
	inAdditional = 3
)

func count(msg []byte, section int) int       { return int(u16(msg, 4+2*section)) }
func setCount(msg []byte, section int, n int) { put16(msg, 4+2*section, uint16(n)) }
func clearCounts(msg []byte, sections ...int) []byte {
	for _, s := range sections {
		setCount(msg, s, 0)
	}
	return msg
}

// record is where a resource record lies in a message: its owner at start, its type, class, TTL and length at fixed,
// its data up to end.
type record struct{ section, start, fixed, end int }

func (r record) rtype(msg []byte) uint16 { return u16(msg, r.fixed) }
func (r record) ttl(msg []byte) uint32   { return u32(msg, r.fixed+4) }
func (r record) data(msg []byte) []byte  { return msg[r.fixed+10 : r.end] }

// walk calls f for each record of a message whose question ends at off, and returns where the last one ends.
func walk(msg []byte, off int, f func(record)) (int, error) {
	for section := inAnswer; section <= inAdditional; section++ {
		for range count(msg, section) {
			r := record{section: section, start: off}
			var err error
			if r.fixed, err = skipName(msg, off); err != nil {
				return 0, err
			}
			if r.fixed+10 > len(msg) {
				return 0, errFormat
			}
			r.end = r.fixed + 10 + int(u16(msg, r.fixed+8))
			if r.end > len(msg) {
				return 0, errFormat
			}
			f(r)
			off = r.end
		}
	}
	return off, nil
}

// skipName returns where the name at off ends. It does not follow a compression pointer.
func skipName(msg []byte, off int) (int, error) {
	for start := off; off < len(msg) && off-start < 255; {
		switch n := int(msg[off]); {
		case n == 0:
			return off + 1, nil
		case n < 0x40:
			off += 1 + n
		case n >= 0xc0 && off+2 <= len(msg):
			return off + 2, nil
		default:
			return 0, errFormat
		}
	}
	return 0, errFormat
}

// questionEnd returns where the only question of a message ends. Its name cannot be compressed: nothing precedes it but the header, which
// is another one in the reply.
func questionEnd(msg []byte) (int, error) {
	for off := headerLen; off < len(msg) && off-headerLen < 255; {
		n := int(msg[off])
		off += 1 + n
		switch {
		case n == 0 && off+4 <= len(msg):
			return off + 4, nil
		case n == 0 || n >= 0x40:
			return 0, errFormat
		}
	}
	return 0, errFormat
}

// query is a question as a client sent it. All slices lie in msg.
type query struct {
	msg      []byte
	question []byte // name, type and class as they were written; nil if the message could not be read so far
	name     string // as Source.Lookup wants it
	qtype    uint16
	qclass   uint16
	opt      int  // where the class of the OPT record lies, which has the client's buffer size; 0: no EDNS
	do       bool // the client wants DNSSEC records
	plain    bool // nothing in it but the question and an OPT without options: the answer is anybody's
}

// parse reads a message. False means that it deserves no answer; a code other than success is the answer.
func (q *query) parse(msg []byte) (rcode int, ok bool) {
	if len(msg) < headerLen || flags(msg)&flagQR != 0 {
		return 0, false
	}
	*q = query{msg: msg}
	if flags(msg)&opcodeMask != miekg.OpcodeQuery<<11 {
		return miekg.RcodeNotImplemented, true
	}
	if count(msg, 0) != 1 {
		return miekg.RcodeFormatError, true
	}
	end, err := questionEnd(msg)
	if err != nil {
		return miekg.RcodeFormatError, true
	}
	name, _, err := miekg.UnpackDomainName(msg, headerLen)
	if err != nil {
		return miekg.RcodeFormatError, true
	}
	q.question, q.name = msg[headerLen:end], miekg.CanonicalName(name)
	q.qtype, q.qclass = u16(msg, end-4), u16(msg, end-2)
	return q.parseRecords(end), true
}

// parseRecords reads what follows the question, the OPT record above all, and returns a code as parse does.
func (q *query) parseRecords(off int) (rcode int) {
	q.plain = true
	opts, version := 0, byte(0)
	end, err := walk(q.msg, off, func(r record) {
		if r.section != inAdditional || r.rtype(q.msg) != miekg.TypeOPT {
			q.plain = false
			return
		}
		opts++
		q.opt = r.fixed + 2
		q.do = r.ttl(q.msg)&flagDO != 0
		version = q.msg[r.fixed+5]
		if len(r.data(q.msg)) > 0 {
			q.plain = false
		}
	})
	switch {
	case err != nil || opts > 1:
		q.opt = 0
		return miekg.RcodeFormatError
	case version != 0:
		return miekg.RcodeBadVers
	}
	q.msg = q.msg[:end]
	return miekg.RcodeSuccess
}

// unqualified tells whether the question is for addresses of a name with a single label. Other types of such names,
// as DS of com, are what a resolver in a container asks for.
func (q *query) unqualified() bool {
	return (q.qtype == miekg.TypeA || q.qtype == miekg.TypeAAAA) && miekg.CountLabel(q.name) == 1
}

// clone makes a copy of the query that does not lie in the reader's buffer.
func (q *query) clone() *query {
	c := *q
	c.msg = append([]byte(nil), q.msg...)
	c.question = c.msg[headerLen : headerLen+len(q.question)]
	return &c
}

// limit is how long a reply may be.
func (q *query) limit(t transport) int {
	switch {
	case t == overTCP:
		return miekg.MaxMsgSize
	case q.opt == 0:
		return miekg.MinMsgSize
	}
	return min(max(int(u16(q.msg, q.opt)), miekg.MinMsgSize), maxReply)
}

// keySpace is enough for what appendKey writes.
const keySpace = 255 + 4 + 1

// appendKey writes what makes two plain queries have the same answer.
func (q *query) appendKey(b []byte) []byte {
	name := len(q.question) - 4
	for _, c := range q.question[:name] {
		b = append(b, lower(c))
	}
	b = append(b, q.question[name:]...)
	var bits byte
	for i, set := range [...]bool{
		flags(q.msg)&flagRD != 0, flags(q.msg)&flagAD != 0, flags(q.msg)&flagCD != 0, q.opt != 0, q.do,
	} {
		if set {
			bits |= 1 << i
		}
	}
	return append(b, bits)
}
