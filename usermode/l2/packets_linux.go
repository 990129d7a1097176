package l2

import (
	"encoding/binary"
	"errors"
	"io"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// packetBatch is how many packets one system call moves at most.
const packetBatch = 64

// packets receives and sends on a socket whose packets are frames, many by one system call.
type packets struct {
	raw      syscall.RawConn
	seq      bool // SOCK_SEQPACKET: what is empty may be the end
	slot     int  // bytes for each packet that is received
	rx, tx   messages
	frames   []Frame
	bad      uint64
	received int
	rxErr    error
	recv     func(fd uintptr) bool

	// The arguments and results of the functions below, which raw calls.
	b       []byte
	done    int
	txErr   error
	tryOnce func(fd uintptr) bool
	all     func(fd uintptr) bool
}

// messages are the arguments of recvmmsg(2) or sendmmsg(2), each with one buffer.
type messages struct {
	hdrs [packetBatch]nonblock.Message
	iovs [packetBatch]unix.Iovec
}

func newPackets(c PacketConn, raw syscall.RawConn, opts Options) *packets {
	p := &packets{raw: raw, frames: make([]Frame, 0, packetBatch), slot: 2048}
	if n := opts.MTU; n == 0 || n+headerLen+vlanLen >= p.slot {
		p.slot = MaxFrame + 1
	}
	p.seq = c.LocalAddr() != nil && c.LocalAddr().Network() == "unixpacket"
	bufs := make([]byte, packetBatch*p.slot)
	for i := range packetBatch {
		p.rx.set(i, bufs[i*p.slot:][:p.slot])
	}
	p.recv = func(fd uintptr) bool {
		p.received, p.rxErr = nonblock.Recvmmsg(int(fd), p.rx.hdrs[:])
		return !errors.Is(p.rxErr, unix.EAGAIN)
	}
	p.tryOnce = func(fd uintptr) bool {
		p.sendSome(fd)
		return true
	}
	p.all = func(fd uintptr) bool { return p.sendSome(fd) }
	return p
}

// set makes b the buffer of message i.
func (m *messages) set(i int, b []byte) {
	m.iovs[i].Base = &b[0]
	m.iovs[i].SetLen(len(b))
	m.hdrs[i].Hdr.Iov = &m.iovs[i]
	m.hdrs[i].Hdr.SetIovlen(1)
}

func (p *packets) dropped() uint64 { return p.bad }

func (p *packets) receive() ([]Frame, error) {
	for {
		if err := p.raw.Read(p.recv); err != nil {
			return nil, err
		}
		if p.rxErr != nil {
			return nil, p.rxErr
		}
		frames := p.frames[:0]
		for i := range p.received {
			m := &p.rx.hdrs[i]
			n := int(m.Len)
			if n == 0 && p.seq && p.hungUp() {
				if len(frames) > 0 {
					break // it comes again
				}
				return nil, io.EOF
			}
			if n < headerLen || n > MaxFrame || m.Hdr.Flags&unix.MSG_TRUNC != 0 {
				p.bad++
				continue
			}
			frames = append(frames, Frame{Head: unsafe.Slice(p.rx.iovs[i].Base, n)})
		}
		if len(frames) > 0 {
			return frames, nil
		}
	}
}

// hungUp tells whether the other end of a connection is gone, as opposed to having sent an empty packet.
func (p *packets) hungUp() bool {
	gone := true
	p.raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		gone = err != nil || n > 0
	})
	return gone
}

func (p *packets) try(b []byte) (int, error) {
	p.b, p.done, p.txErr = b, 0, nil
	err := p.raw.Write(p.tryOnce)
	p.b = nil
	if err == nil {
		err = p.txErr
	}
	return p.done, err
}

func (p *packets) write(b []byte) error {
	p.b, p.done, p.txErr = b, 0, nil
	err := p.raw.Write(p.all)
	p.b = nil
	if err == nil {
		err = p.txErr
	}
	return err
}

// sendSome sends until nothing is left or there is no more room, and tells whether it need not be called again.
func (p *packets) sendSome(fd uintptr) bool {
	for p.done < len(p.b) {
		n := 0
		for rest := p.b[p.done:]; len(rest) > 0 && n < packetBatch; n++ {
			length := binary.BigEndian.Uint32(rest)
			p.tx.set(n, rest[4:][:length])
			rest = rest[4+length:]
		}
		k, err := nonblock.Sendmmsg(int(fd), p.tx.hdrs[:n])
		switch {
		case err == nil:
		case errors.Is(err, unix.EAGAIN):
			return false
		case errors.Is(err, unix.EMSGSIZE), errors.Is(err, unix.ENOBUFS):
			k = 1 // longer than the socket's buffer, or than the kernel's memory is: this one is lost
		default:
			p.txErr = err
			return true
		}
		for i := range k {
			p.done += 4 + int(p.tx.iovs[i].Len)
		}
	}
	return true
}
