package usermode

import (
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// maxBurst is how many bytes go together.
const maxBurst = maxDatagram - ipv4HdrLen - udpHdrLen

// burst collects datagrams of one flow that came one after the other, until the TUN has no more: the kernel takes them
// all at once then, and cuts them at the end of their way through it.
type burst struct {
	flow  *udpFlow // nil: there are none
	hops  uint8
	whole bool
	size  int // bytes of each; the last may be shorter, and ends the burst
	n     int
	ended bool
	data  []byte

	segments nonblock.Segments
	iovec    [1]unix.Iovec
}

// add takes d, of flow f, unless it does not fit what is there.
func (b *burst) add(f *udpFlow, d *datagram) bool {
	size := d.size()
	if b.flow == nil {
		if f.single || !nonblock.CutsDatagrams() || size == 0 || size > maxBurst {
			return false
		}
		if b.data == nil {
			b.data = make([]byte, 0, maxBurst)
		}
		b.flow, b.hops, b.whole, b.size, b.n, b.ended, b.data = f, d.hops, d.whole, size, 0, false, b.data[:0]
	} else if b.flow != f || b.ended || b.hops != d.hops || b.whole != d.whole || size == 0 || size > b.size ||
		b.n == nonblock.MaxSegments || len(b.data)+size > maxBurst {
		return false
	}
	b.n++
	b.ended = size < b.size
	b.data = append(append(b.data, d.payload[0]...), d.payload[1]...)
	return true
}

// flush sends what has been collected.
func (b *burst) flush() {
	f := b.flow
	if f == nil {
		return
	}
	b.flow = nil
	if b.n > 1 {
		f.path.set(f.fd, f.key.dst.Addr().Is4(), b.hops, b.whole)
		b.iovec[0] = nonblock.Iovec(b.data)
		switch err := b.segments.Send(f.fd, b.iovec[:], b.size); err {
		case nil:
			return
		case unix.EAGAIN, unix.ENOBUFS:
			f.table.dropped.Add(uint64(b.n))
			return
		case unix.EINVAL, unix.EIO, unix.EMSGSIZE:
			// Longer than the way to the destination is wide, or not to be had for it, or in this kernel.
			f.single = true
		}
	}
	for data := b.data; len(data) > 0; {
		one := data[:min(b.size, len(data))]
		data = data[len(one):]
		f.sendAgain(one, b.hops, b.whole)
	}
}
