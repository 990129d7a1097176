package l2

import (
	"encoding/binary"
)

// What a network card would do with a frame that is not finished, for receivers that do not do it: the checksum, and the cut
// into segments. Both work in the output buffer, so that the payload is read once and summed where it is hot.

// payload hands out what is behind a frame's headers.
type payload struct {
	part []byte
	tail [][]byte
}

// appendTo appends the next n bytes to b.
func (p *payload) appendTo(b []byte, n int) []byte {
	for n > 0 {
		if len(p.part) == 0 {
			p.part, p.tail = p.tail[0], p.tail[1:]
			continue
		}
		k := min(n, len(p.part))
		b = append(b, p.part[:k]...)
		p.part, n = p.part[k:], n-k
	}
	return b
}

// appendSummed appends f in fr's form to b, with its checksum. f has been checked.
func appendSummed(b []byte, fr Framing, f *Frame) []byte {
	b = fr.appendPrefix(b, f.Len(), Virtio{})
	at := len(b)
	b = f.appendTo(b)
	fromL4 := b[at+int(f.Virtio.CsumStart):]
	field := fromL4[f.Virtio.CsumOffset:][:2]
	csum := fold(sum(fromL4, 0)) // the field has the pseudo header's sum already
	if csum == 0 {
		csum = 0xffff // to UDP 0 means that there is none (RFC 768); to the others it is the same
	}
	binary.BigEndian.PutUint16(field, csum)
	return b
}

// appendSegments appends f to b as segments of f.Virtio.GSOSize, each in fr's form. f has been checked.
func appendSegments(b []byte, fr Framing, f *Frame) []byte {
	l, err := f.segmentLayout()
	if err != nil {
		return b
	}
	p := payload{f.Head[l.headers:], f.Tail}
	left := f.Len() - l.headers
	for i := 0; i == 0 || left > 0; i++ {
		n := min(left, int(f.Virtio.GSOSize))
		left -= n
		b = fr.appendPrefix(b, l.headers+n, Virtio{})
		at := len(b)
		b = append(b, f.Head[:l.headers]...)
		b = p.appendTo(b, n)
		l.patch(b[at:], i, int(f.Virtio.GSOSize), left == 0)
	}
	return b
}

const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

// patch makes the headers of segment i, which are the whole's, its own.
func (l layout) patch(seg []byte, i, size int, last bool) {
	ip, tcp := seg[l.ip:], seg[l.tcp:]
	binary.BigEndian.PutUint32(tcp[4:], binary.BigEndian.Uint32(tcp[4:])+uint32(i*size))
	if !last {
		tcp[13] &^= tcpFIN | tcpPSH
	}
	if i > 0 {
		tcp[13] &^= tcpCWR // RFC 3168, 6.1.2: once
	}
	pseudo := uint64(len(tcp)) + protoTCP
	if ip[0]>>4 == 4 {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
		binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(ip[4:])+uint16(i))
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], fold(sum(ip[:l.tcp-l.ip], 0)))
		pseudo = sum(ip[12:20], pseudo)
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
		pseudo = sum(ip[8:40], pseudo)
	}
	tcp[16], tcp[17] = 0, 0
	binary.BigEndian.PutUint16(tcp[16:], fold(sum(tcp, pseudo)))
}

// wireLen is how many bytes appendFrame will need for f, and how long its longest frame will be.
func wireLen(fr Framing, takes Offload, f *Frame) (total, longest int) {
	n := f.Len()
	if takes.takes(f.Virtio) || f.Virtio.GSOType == GSONone {
		return fr.prefixLen() + n, n
	}
	headers, size := int(f.Virtio.HdrLen), int(f.Virtio.GSOSize)
	segments := max((n-headers+size-1)/size, 1)
	return segments*(fr.prefixLen()+headers) + n - headers, min(n, headers+size)
}

// appendFrame appends f in fr's form to b, finished as far as the receiver does not do it.
func appendFrame(b []byte, fr Framing, takes Offload, f *Frame) []byte {
	switch {
	case takes.takes(f.Virtio):
		return f.appendTo(fr.appendPrefix(b, f.Len(), f.Virtio))
	case f.Virtio.GSOType == GSONone:
		return appendSummed(b, fr, f)
	}
	return appendSegments(b, fr, f)
}
