package agent

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/usermode/l2"
)

const (
	// sendBatch is how many frames are sent at once at most, and sendBytes how many bytes if none of them is long.
	sendBatch = 64
	sendBytes = 64 << 10
	// slot is room for the longest frame and its header.
	slot = l2.VirtioLen + l2.MaxFrame
)

// sender carries frames of the TAP to the link.
type sender struct {
	tap    *tap
	link   *l2.Link
	hdrLen int
	buf    []byte
	frames []l2.Frame
	err    error
	fill   func(fd uintptr) bool
}

func newSender(t *tap, link *l2.Link) *sender {
	s := &sender{tap: t, link: link, buf: make([]byte, sendBytes+slot), frames: make([]l2.Frame, 0, sendBatch)}
	if t.vnet {
		s.hdrLen = l2.VirtioLen
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
		if _, err := s.link.Send(s.frames); err != nil {
			return fmt.Errorf("send frames: %w", err)
		}
	}
}

// read takes what the TAP has, as much of it as goes into buf. It returns false if there was nothing.
func (s *sender) read(fd uintptr) bool {
	s.frames, s.err = s.frames[:0], nil
	for used := 0; used < sendBytes && len(s.frames) < sendBatch; {
		n, _, errno := unix.Syscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&s.buf[used])), slot)
		switch errno {
		case 0:
		case unix.EINTR, unix.EINVAL: // EINVAL: a frame that the driver cannot describe, and has thrown away
			continue
		case unix.EAGAIN:
			return len(s.frames) > 0
		default:
			s.err = errno
			return true
		}
		b := s.buf[used : used+int(n)]
		used += int(n)
		if len(b) < s.hdrLen+headerLen {
			continue
		}
		f := l2.Frame{Head: b[s.hdrLen:]}
		if s.hdrLen > 0 {
			f.Virtio = decodeVirtio(b)
		}
		s.frames = append(s.frames, f)
	}
	return true
}

// writer carries frames of the link to the TAP.
type writer struct {
	tap    *tap
	link   *l2.Link
	frames []l2.Frame
	hdr    [l2.VirtioLen]byte
	iovs   []unix.Iovec
	lost   uint64
	err    error
	empty  func(fd uintptr) bool
}

func newWriter(t *tap, link *l2.Link) *writer {
	w := &writer{tap: t, link: link, iovs: make([]unix.Iovec, 0, 8)}
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
		_, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&iovs[0])), uintptr(len(iovs)))
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		case unix.EBADFD:
			w.err = errno
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
		iovs = appendIovec(iovs, w.hdr[:])
	}
	iovs = appendIovec(iovs, f.Head)
	for _, b := range f.Tail {
		iovs = appendIovec(iovs, b)
	}
	w.iovs = iovs
	return iovs
}

func appendIovec(iovs []unix.Iovec, b []byte) []unix.Iovec {
	if len(b) == 0 {
		return iovs
	}
	v := unix.Iovec{Base: &b[0]}
	v.SetLen(len(b))
	return append(iovs, v)
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
