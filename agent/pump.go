package agent

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
	"github.com/usernet/usernet/usermode/l2"
)

// sendBytes is how many bytes are sent at once: no more frames are taken when there are as many.
const sendBytes = 64 << 10

// sender carries frames of the TAP to the link.
type sender struct {
	tap   *tap
	link  *l2.Link
	sent  *atomic.Uint64 // batches
	batch *l2.Batch
	hdr   [l2.VirtioLen]byte
	iovs  [2]unix.Iovec
	err   error
	fill  func(fd uintptr) bool
}

func newSender(t *tap, link *l2.Link, sent *atomic.Uint64) *sender {
	s := &sender{tap: t, link: link, sent: sent, batch: link.NewBatch(sendBytes)}
	s.iovs[0].Base = &s.hdr[0]
	if t.vnet {
		s.iovs[0].SetLen(len(s.hdr))
	}
	s.fill = s.read
	return s
}

// run ends with the link or the TAP. It returns an error always.
func (s *sender) run() error {
	for {
		err := s.tap.raw.Read(s.fill)
		if err == nil {
			err = s.err
		}
		if err != nil {
			return fmt.Errorf("%w: read: %w", errTAP, err)
		}
		if err := s.link.SendBatch(s.batch); err != nil {
			return fmt.Errorf("send frames: %w", err)
		}
		s.sent.Add(1)
	}
}

// read takes what the TAP has, as much of it as goes into the batch. It returns false if there was nothing.
func (s *sender) read(fd uintptr) bool {
	s.err = nil
	hdrLen := int(s.iovs[0].Len)
	for room := s.batch.Next(); room != nil; room = s.batch.Next() {
		s.iovs[1].Base = &room[0]
		s.iovs[1].SetLen(len(room))
		n, err := nonblock.Readv(int(fd), s.iovs[:])
		switch err {
		case nil:
		case unix.EINVAL: // a frame that the driver cannot describe, and has thrown away
			continue
		case unix.EAGAIN:
			return s.batch.Len() > 0
		default:
			s.err = err
			return true
		}
		var v l2.Virtio
		if hdrLen > 0 {
			v = decodeVirtio(s.hdr[:])
		}
		s.batch.Add(max(n-hdrLen, 0), v)
	}
	return true
}

// writer carries frames of the link to the TAP.
type writer struct {
	tap    *tap
	link   *l2.Link
	heard  *atomic.Uint64 // batches
	frames []l2.Frame
	hdr    [l2.VirtioLen]byte
	iovs   []unix.Iovec
	lost   uint64
	err    error
	empty  func(fd uintptr) bool
}

func newWriter(t *tap, link *l2.Link, heard *atomic.Uint64) *writer {
	w := &writer{tap: t, link: link, heard: heard, iovs: make([]unix.Iovec, 0, 8)}
	w.empty = w.write
	return w
}

// run ends with the link or the TAP. It returns an error always.
func (w *writer) run() error {
	for {
		frames, err := w.link.Receive()
		if err != nil {
			return fmt.Errorf("receive frames: %w", err)
		}
		w.heard.Add(1)
		w.frames = frames
		if err = w.tap.raw.Write(w.empty); err == nil {
			err = w.err
		}
		if err != nil {
			return fmt.Errorf("%w: write: %w", errTAP, err)
		}
	}
}

// write writes the frames, and returns false if some are left that the TAP has no room for.
func (w *writer) write(fd uintptr) bool {
	w.err = nil
	for len(w.frames) > 0 {
		iovs := w.gather(&w.frames[0])
		_, err := nonblock.Writev(int(fd), iovs)
		switch err {
		case nil:
		case unix.EAGAIN:
			return false
		case unix.EBADFD:
			w.err = err
			return true
		default:
			w.lost++ // EIO: the TAP is down; EINVAL: not a frame; ENOMEM
		}
		w.frames = w.frames[1:]
	}
	return true
}

// gather is what a frame is for writev(2).
func (w *writer) gather(f *l2.Frame) []unix.Iovec {
	iovs := w.iovs[:0]
	if w.tap.vnet {
		encodeVirtio(w.hdr[:], f.Virtio)
		iovs = append(iovs, nonblock.Iovec(w.hdr[:]))
	}
	iovs = append(iovs, nonblock.Iovec(f.Head))
	for _, b := range f.Tail {
		if len(b) > 0 {
			iovs = append(iovs, nonblock.Iovec(b))
		}
	}
	w.iovs = iovs
	return iovs
}

// decodeVirtio reads the header in front of a frame. Its numbers have the machine's byte order.
func decodeVirtio(b []byte) l2.Virtio {
	_ = b[l2.VirtioLen-1]
	return l2.Virtio{
		Flags:      b[0],
		GSOType:    b[1],
		HdrLen:     binary.NativeEndian.Uint16(b[2:]),
		GSOSize:    binary.NativeEndian.Uint16(b[4:]),
		CsumStart:  binary.NativeEndian.Uint16(b[6:]),
		CsumOffset: binary.NativeEndian.Uint16(b[8:]),
	}
}

func encodeVirtio(b []byte, v l2.Virtio) {
	_ = b[l2.VirtioLen-1]
	b[0], b[1] = v.Flags, v.GSOType
	binary.NativeEndian.PutUint16(b[2:], v.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], v.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], v.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], v.CsumOffset)
}
