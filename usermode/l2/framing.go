package l2

import (
	"encoding/binary"
	"fmt"
)

// Framing is the form in which frames follow each other on a link. The package comment describes them.
type Framing uint8

// The framings.
const (
	HyperKit Framing = iota
	QEMU
	Usernet
	Bare
)

func (fr Framing) String() string {
	return [...]string{"hyperkit", "qemu", "usernet", "bare"}[fr]
}

// prefixLen is the number of bytes in front of a frame. Between frames of a Bare link, in memory, there are lengths too.
func (fr Framing) prefixLen() int {
	switch fr {
	case HyperKit:
		return 2
	case Usernet:
		return 4 + VirtioLen
	}
	return 4
}

// limit is the length of the longest frame that can be written.
func (fr Framing) limit() int {
	if fr == HyperKit {
		return 65535
	}
	return MaxFrame
}

// appendPrefix appends to b what stands in front of a frame of n bytes. Only Usernet has a place for v.
func (fr Framing) appendPrefix(b []byte, n int, v Virtio) []byte {
	switch fr {
	case HyperKit:
		return binary.LittleEndian.AppendUint16(b, uint16(n))
	case Usernet:
		return v.appendTo(binary.BigEndian.AppendUint32(b, uint32(VirtioLen+n)))
	}
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

// meant is the longest length after which a stream is still taken to be in step: what is longer than MaxFrame is skipped.
const meant = 1 << 20

// splitter takes frames out of a stream.
type splitter struct {
	framing Framing
	skip    int    // bytes of a frame that is dropped, still to come
	dropped uint64 // frames too short, too long, or with a wrong header
}

// split appends the whole frames in b to frames, up to its capacity, and returns how much of b they took. The frames are parts of b.
func (s *splitter) split(b []byte, frames []Frame) ([]Frame, int, error) {
	used := 0
	for len(frames) < cap(frames) {
		if s.skip > 0 {
			n := min(s.skip, len(b)-used)
			s.skip, used = s.skip-n, used+n
		}
		rest := b[used:]
		n, prefix, ok := s.length(rest)
		if !ok {
			break
		}
		if n < 0 || n > meant {
			return frames, used, fmt.Errorf("frame of %d bytes: %w", n, ErrOutOfStep)
		}
		whole := prefix + int(n)
		if n < headerLen || n > MaxFrame {
			s.dropped++
			s.skip = whole
			continue
		}
		if len(rest) < whole {
			break
		}
		f := Frame{Head: rest[prefix:whole:whole]}
		if s.framing == Usernet {
			f.Virtio = decodeVirtio(rest[4:])
		}
		used += whole
		if f.check() != nil {
			s.dropped++
			continue
		}
		frames = append(frames, f)
	}
	return frames, used, nil
}

// length reads a frame's length, without what is in front of it, so it may be negative; ok is false while b is too short to tell.
func (s *splitter) length(b []byte) (n int64, prefix int, ok bool) {
	prefix = s.framing.prefixLen()
	if len(b) < prefix {
		return 0, 0, false
	}
	switch s.framing {
	case HyperKit:
		return int64(binary.LittleEndian.Uint16(b)), prefix, true
	case Usernet:
		return int64(binary.BigEndian.Uint32(b)) - VirtioLen, prefix, true
	}
	return int64(binary.BigEndian.Uint32(b)), prefix, true
}
