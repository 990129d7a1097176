package dns

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	miekg "github.com/miekg/dns"
)

const (
	// maxReply is the longest reply by UDP, in bytes, whatever the client says it takes.
	maxReply = 4096
	// udpSize is the longest message by UDP that this resolver asks for: it passes every path unfragmented.
	udpSize = 1232
	// localTTL is for what sources answer, negative answers too. Containers come and go, and asking again is cheap.
	localTTL = 0
)

// atQuestion is a compressed name: the one of the question.
const atQuestion = 0xc000 | headerLen

// appendHeader begins a reply: the header, without records, and the question.
func (q *query) appendHeader(b []byte, more uint16, rcode int) []byte {
	asked := flags(q.msg)
	b = append(b, q.msg[0], q.msg[1])
	b = binary.BigEndian.AppendUint16(b, flagQR|flagRA|asked&(opcodeMask|flagRD|flagCD)|more|uint16(rcode)&rcodeMask)
	b = append(b, make([]byte, headerLen-4)...)
	if q.question != nil {
		setCount(b, 0, 1)
	}
	return append(b, q.question...)
}

// appendOPT ends a reply to a client that speaks EDNS (RFC 6891 section 6.1).
func (q *query) appendOPT(b []byte, start, rcode int) []byte {
	if q.opt == 0 {
		return b
	}
	setCount(b[start:], inAdditional, 1)
	b = append(b, 0) // the root
	b = binary.BigEndian.AppendUint16(b, miekg.TypeOPT)
	b = binary.BigEndian.AppendUint16(b, udpSize)
	var do uint32
	if q.do {
		do = flagDO
	}
	b = binary.BigEndian.AppendUint32(b, uint32(rcode>>4)<<24|do)
	return binary.BigEndian.AppendUint16(b, 0)
}

// appendError makes a reply without records.
func (q *query) appendError(b []byte, rcode int) []byte {
	start := len(b)
	return q.appendOPT(q.appendHeader(b, 0, rcode), start, rcode)
}

// appendTruncated makes a reply that sends the client to TCP.
func (q *query) appendTruncated(b []byte) []byte {
	start := len(b)
	return q.appendOPT(q.appendHeader(b, flagTC, miekg.RcodeSuccess), start, miekg.RcodeSuccess)
}

// appendAnswer makes the reply that a source's answer amounts to.
func (q *query) appendAnswer(b []byte, a Answer) []byte {
	start, rcode := len(b), miekg.RcodeSuccess
	if a.Missing {
		rcode = miekg.RcodeNameError
	}
	b = q.appendHeader(b, flagAA, rcode)
	n := 0
	if !a.Missing {
		b, n = q.appendRecords(b, a)
	}
	setCount(b[start:], inAnswer, n)
	if n == 0 {
		zone := a.Zone
		if zone == "" {
			zone = q.name
		}
		b = appendSOA(b, zone)
		setCount(b[start:], inAuthority, 1)
	}
	return q.appendOPT(b, start, rcode)
}

// appendRecords writes what the answer has of the type that was asked for, and returns how many records that is.
func (q *query) appendRecords(b []byte, a Answer) ([]byte, int) {
	n, all := 0, q.qtype == miekg.TypeANY
	if q.qtype == miekg.TypeA || q.qtype == miekg.TypeAAAA || all {
		// A random beginning, not the next one: clients ask for A and AAAA in turn, and with a counter each kind would
		// see every other address only.
		begin := 0
		if len(a.Addrs) > 1 {
			begin = rand.IntN(len(a.Addrs))
		}
		for i := range a.Addrs {
			addr := a.Addrs[(begin+i)%len(a.Addrs)]
			if t := typeOf(addr); t == q.qtype || all {
				b = appendFixed(b, t, addr.BitLen()/8)
				b = append(b, addr.AsSlice()...)
				n++
			}
		}
	}
	if q.qtype == miekg.TypePTR || all {
		for _, name := range a.Names {
			b = appendFixed(b, miekg.TypePTR, 0)
			at := len(b)
			b = appendName(b, name)
			put16(b, at-2, uint16(len(b)-at))
			n++
		}
	}
	return b, n
}

func typeOf(a netip.Addr) uint16 {
	if a.Is4() {
		return miekg.TypeA
	}
	return miekg.TypeAAAA
}

// appendFixed begins a record about the name of the question, up to its data.
func appendFixed(b []byte, rtype uint16, length int) []byte {
	b = binary.BigEndian.AppendUint16(b, atQuestion)
	b = binary.BigEndian.AppendUint16(b, rtype)
	b = binary.BigEndian.AppendUint16(b, miekg.ClassINET)
	b = binary.BigEndian.AppendUint32(b, localTTL)
	return binary.BigEndian.AppendUint16(b, uint16(length))
}

// appendSOA writes the record that makes a negative answer one that clients understand (RFC 2308 section 2), with the
// values of RFC 6303 section 3 for zones that exist here only.
func appendSOA(b []byte, zone string) []byte {
	b = appendName(b, zone)
	b = binary.BigEndian.AppendUint16(b, miekg.TypeSOA)
	b = binary.BigEndian.AppendUint16(b, miekg.ClassINET)
	b = binary.BigEndian.AppendUint32(b, localTTL)
	b = append(b, 0, 0)
	at := len(b)
	b = appendName(b, zone)
	b = appendName(b, "nobody.invalid.")
	for _, v := range [...]uint32{1, 3600, 1200, 604800, localTTL} { // serial, refresh, retry, expire, minimum
		b = binary.BigEndian.AppendUint32(b, v)
	}
	put16(b, at-2, uint16(len(b)-at))
	return b
}

// appendName writes a name without compression; one that is none becomes the root.
func appendName(b []byte, name string) []byte {
	at := len(b)
	b = append(b, make([]byte, 256)...)
	end, err := miekg.PackDomainName(name, b, at, nil, false)
	if err != nil {
		return append(b[:at], 0)
	}
	return b[:end]
}

// adopt makes msg, an answer to the same question of somebody else, the reply to q: its ID, its spelling, its size.
func (q *query) adopt(msg []byte, limit int) []byte {
	copy(msg, q.msg[:2])
	copy(msg[headerLen:], q.question)
	return truncate(msg, limit)
}

// truncate cuts a reply to at most limit bytes, in place. As many records of the answer stay as fit, because old
// resolvers (musl before 1.2.4) work with what they get and never try TCP; of the rest only OPT stays.
func truncate(msg []byte, limit int) []byte {
	if len(msg) <= limit {
		return msg
	}
	end, err := questionEnd(msg)
	if err != nil {
		return msg[:0]
	}
	var answers []record
	var opt record
	walk(msg, end, func(r record) { // an error leaves us what came before it
		switch {
		case r.section == inAnswer:
			answers = append(answers, r)
		case r.section == inAdditional && r.rtype(msg) == miekg.TypeOPT:
			opt = r
		}
	})
	if end+opt.end-opt.start > limit { // options that no datagram of the client takes
		opt = record{}
	}
	n := 0
	for n < len(answers) && answers[n].end+opt.end-opt.start <= limit {
		end = answers[n].end
		n++
	}
	put16(msg, 2, flags(msg)|flagTC)
	clearCounts(msg, inAuthority, inAdditional)
	setCount(msg, inAnswer, n)
	if opt.end > 0 {
		setCount(msg, inAdditional, 1)
	}
	return append(msg[:end], msg[opt.start:opt.end]...)
}
