package l2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Virtio is what struct virtio_net_hdr_v1 says of a frame that is not finished: its checksum is missing, or it is to be cut. The
// zero value says that the frame is as it should be.
type Virtio struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // bytes before the first segment's payload
	GSOSize    uint16 // payload bytes of each segment
	CsumStart  uint16 // where the checksum's coverage begins
	CsumOffset uint16 // where, from CsumStart, it belongs
}

// VirtioLen is the length of struct virtio_net_hdr_v1, which has a count of buffers at its end, always 0 here.
const VirtioLen = 12

// From linux/virtio_net.h.
const (
	NeedsCsum = 1 // Flags: the checksum field has the sum of the pseudo header only
	DataValid = 2 // Flags: the checksum has been verified

	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOECN   = 0x80 // with one of the others: there is CWR in the TCP header
)

// Offload is a set of things that the receiver of frames does itself, so that the sender may leave them out.
type Offload uint8

// The members of an Offload. TSO4 and TSO6 include Csum.
const (
	Csum Offload = 1 << iota // frames without a checksum of layer 4
	TSO4                     // TCP segments to be cut, over IPv4
	TSO6                     // likewise over IPv6

	AllOffload = Csum | TSO4 | TSO6
)

var offloadNames = []string{"csum", "tso4", "tso6"}

// String lists the members, with commas: csum, tso4, tso6.
func (o Offload) String() string {
	var names []string
	for i, name := range offloadNames {
		if o&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

// parseOffload reads what String writes. What it does not know it leaves out, for the sake of later versions.
func parseOffload(s string) Offload {
	var o Offload
	for field := range strings.SplitSeq(s, ",") {
		for i, name := range offloadNames {
			if strings.EqualFold(strings.TrimSpace(field), name) {
				o |= 1 << i
			}
		}
	}
	if o&Csum == 0 {
		return 0
	}
	return o
}

// takes tells whether a receiver with o gets v's frame as it is.
func (o Offload) takes(v Virtio) bool {
	switch v.GSOType &^ GSOECN {
	case GSOTCPv4:
		return o&TSO4 != 0
	case GSOTCPv6:
		return o&TSO6 != 0
	}
	return v.Flags&NeedsCsum == 0 || o&Csum != 0
}

func decodeVirtio(b []byte) Virtio {
	_ = b[VirtioLen-1]
	return Virtio{
		Flags:      b[0],
		GSOType:    b[1],
		HdrLen:     binary.LittleEndian.Uint16(b[2:]),
		GSOSize:    binary.LittleEndian.Uint16(b[4:]),
		CsumStart:  binary.LittleEndian.Uint16(b[6:]),
		CsumOffset: binary.LittleEndian.Uint16(b[8:]),
	}
}

func (v Virtio) appendTo(b []byte) []byte {
	b = append(b, v.Flags, v.GSOType)
	for _, n := range [...]uint16{v.HdrLen, v.GSOSize, v.CsumStart, v.CsumOffset, 0} {
		b = binary.LittleEndian.AppendUint16(b, n)
	}
	return b
}

// minGSOSize bounds what a guest can make of one frame: more segments than of any path that is in use.
const minGSOSize = 256

const tcpCsumOffset = 16

var errVirtio = errors.New("virtio header does not fit its frame")

// check holds f.Virtio against the frame, so that nobody behind has to. It puts right what it need not believe.
func (f *Frame) check() error {
	v := &f.Virtio
	if *v == (Virtio{}) {
		return nil
	}
	v.Flags &= NeedsCsum | DataValid
	if v.GSOType == GSONone {
		v.GSOSize, v.HdrLen = 0, 0
		if v.Flags&NeedsCsum == 0 {
			v.CsumStart, v.CsumOffset = 0, 0
			return nil
		}
		if int(v.CsumStart) < headerLen || int(v.CsumStart)+int(v.CsumOffset)+2 > len(f.Head) {
			return fmt.Errorf("checksum at %d+%d of %d bytes: %w", v.CsumStart, v.CsumOffset, len(f.Head), errVirtio)
		}
		return nil
	}
	if v.Flags&NeedsCsum == 0 || v.CsumOffset != tcpCsumOffset || v.GSOSize < minGSOSize {
		return fmt.Errorf("segments of %d bytes, checksum at %d: %w", v.GSOSize, v.CsumOffset, errVirtio)
	}
	l, err := f.segmentLayout()
	if err != nil {
		return err
	}
	v.HdrLen = uint16(l.headers)
	return nil
}

// layout tells where the headers of a TCP segment begin, and where its payload does.
type layout struct{ ip, tcp, headers int }

// segmentLayout finds the headers that f's Virtio promises: IPv4 or IPv6, and TCP right behind.
func (f *Frame) segmentLayout() (layout, error) {
	v, h := &f.Virtio, f.Head
	etherType, ip := f.layer3()
	l := layout{ip: ip, tcp: int(v.CsumStart)}
	want := -1
	switch v.GSOType &^ GSOECN {
	case GSOTCPv4:
		if etherType == etherIPv4 && len(h) >= ip+20 && h[ip]>>4 == 4 && h[ip]&15 >= 5 && h[ip+9] == protoTCP {
			want = ip + 4*int(h[ip]&15)
		}
	case GSOTCPv6:
		if etherType == etherIPv6 && len(h) >= ip+40 && h[ip]>>4 == 6 && h[ip+6] == protoTCP {
			want = ip + 40
		}
	}
	if l.tcp != want || len(h) < l.tcp+20 {
		return layout{}, fmt.Errorf("segments of type %#x, TCP at %d: %w", v.GSOType, v.CsumStart, errVirtio)
	}
	doff := 4 * int(h[l.tcp+12]>>4)
	l.headers = l.tcp + doff
	if doff < 20 || len(h) < l.headers {
		return layout{}, fmt.Errorf("TCP header of %d bytes: %w", doff, errVirtio)
	}
	return l, nil
}

const (
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)
