package tcprelay

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// newInflow returns what comes from c. Types that embed a socket may read in a way of their own, so they are not taken for one.
func newInflow(c io.Reader) (inflow, error) {
	var raw syscall.RawConn
	var err error
	switch c := c.(type) {
	case *net.TCPConn:
		raw, err = c.SyscallConn()
	case *net.UnixConn:
		raw, err = c.SyscallConn()
	case *socket:
		raw = c.raw
	default:
		return newReadInflow(c), nil
	}
	if err != nil {
		return nil, err
	}
	in := &socketInflow{raw: raw}
	in.fillFn = in.fill
	return in, nil
}

// socketInflow reads straight into the buffers that netstack will send from. To know the length, it asks the socket.
type socketInflow struct {
	raw    syscall.RawConn
	fd     int
	block  *[relayHead]byte // where head is; nil if there is no head
	head   []byte           // read already
	queued int              // bytes that the socket has after head
	more   bool             // the last time there was more than a head
	err    error
	fillFn func(fd uintptr) bool // fill; made once
}

func (in *socketInflow) wait() error {
	in.drop()
	if err := in.raw.Read(in.fillFn); err != nil {
		return err
	}
	return in.err
}

// fill looks what the socket has. It is a syscall.RawConn's callback: false asks to be called again when there is
// something.
func (in *socketInflow) fill(fd uintptr) bool {
	in.fd = int(fd)
	if in.more { // in a long transfer, spare the small read
		if n, err := unix.IoctlGetInt(in.fd, unix.TIOCINQ); err == nil && n > 0 {
			in.queued = min(n, relayBatch)
			return true
		}
		in.more = false
	}
	in.block = smallBlocks.Get().(*[relayHead]byte)
	n, err := nonblock.Read(in.fd, in.block[:])
	if n <= 0 {
		in.drop()
	}
	switch {
	case err == unix.EAGAIN:
		return false
	case err != nil:
		in.err = err
	case n == 0:
		in.err = io.EOF
	default:
		in.head = in.block[:n]
	}
	if n == relayHead {
		if n, err := unix.IoctlGetInt(in.fd, unix.TIOCINQ); err == nil && n > 0 {
			in.queued, in.more = min(n, relayBatch), true
		}
	}
	return true
}

func (in *socketInflow) drop() {
	if in.block != nil {
		smallBlocks.Put(in.block)
	}
	in.block, in.head, in.queued = nil, nil, 0
}

func (in *socketInflow) Len() int { return len(in.head) + in.queued }

// Read gives what there is. It is netstack that calls it, with 64 KiB and, to see whether the end is reached, with
// nothing.
func (in *socketInflow) Read(p []byte) (int, error) {
	n := copy(p, in.head)
	in.head = in.head[n:]
	if n == len(p) || in.queued == 0 {
		return n, nil
	}
	want := min(len(p)-n, in.queued)
	got, err := nonblock.Read(in.fd, p[n:n+want])
	if err != nil {
		return n, err
	}
	if got == 0 { // io.EOF would have netstack ask again for ever
		return n, io.ErrUnexpectedEOF
	}
	in.queued -= got
	return n + got, nil
}
