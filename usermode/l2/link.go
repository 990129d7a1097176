package l2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Options say how a link is spoken on.
type Options struct {
	Framing Framing // of a stream
	// MTU of the network, in bytes of IP packets. What is longer is not sent, since there are receivers that do not survive it. 0: no
	// limit but the framing's.
	MTU int
	// Takes is what the other end finishes itself; of use with Usernet only.
	Takes Offload
	// Early is what has been read from a stream already, behind a request or a handshake.
	Early []byte
}

// A Link is the wire to one machine. Its reading side and its writing side may be used at the same time, each by one
// goroutine. A Port does so; without a switch, use Receive and Send.
type Link struct {
	framing Framing
	takes   Offload
	longest int // bytes of a frame that is sent
	conn    conn
	in      receiver
	out     sender
	buf     []byte // of Send

	// watch, if there is one, returns an error when the other end is gone and reading does not tell, and nil when ctx ends.
	watch func(ctx context.Context) error
}

// conn is what a link needs of a connection besides reading and writing.
type conn interface {
	SetDeadline(t time.Time) error
	Close() error
}

// receiver reads frames.
type receiver interface {
	// receive waits until there are frames. They are valid until it is called again.
	receive() ([]Frame, error)
	// dropped is the number of frames that were none. It is for the goroutine that receives.
	dropped() uint64
}

// sender writes frames that stand one behind the other in wire form, each with its prefix.
type sender interface {
	// write waits until all of b is written.
	write(b []byte) error
	// try writes as much of b as goes without waiting, and returns how much that was: 0 if it cannot tell.
	try(b []byte) (int, error)
}

// window is how many bytes a unix socket is given room for: some of the longest frames, so that neither end waits for the other
// one's turn. On Linux the sender's buffer is the only one there.
const window = 1 << 19

// Stream makes a link of a connected stream: of package vsock, a unix or TCP socket. Handshakes and requests are behind it.
// A unix socket's buffer becomes larger if it is small, as far as the kernel lets it.
func Stream(c net.Conn, opts Options) *Link {
	widen(c)
	return newLink(c, opts, newStreamReader(c, opts), newStreamWriter(c))
}

// Files makes a link of two files that are read and written without blocking a thread (os.File says when SetDeadline works);
// others end with the process only. See Stdio.
func Files(in, out *os.File, opts Options) *Link {
	return newLink(files{in, out}, opts, newStreamReader(in, opts), newStreamWriter(out))
}

// Packets makes a link of a connected socket on which each packet is a frame; opts.Framing is ignored. For sockets
// without a connection see AwaitPeer.
func Packets(c PacketConn, opts Options) (*Link, error) {
	opts.Framing = Bare
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("use socket %s: %w", c.LocalAddr(), err)
	}
	p := newPackets(c, raw, opts)
	return newLink(c, opts, p, p), nil
}

// PacketConn is what *net.UnixConn and *net.UDPConn have in common.
type PacketConn interface {
	net.Conn
	syscall.Conn
}

func newLink(c conn, opts Options, in receiver, out sender) *Link {
	l := &Link{framing: opts.Framing, takes: opts.Takes, longest: opts.Framing.limit(), conn: c, in: in, out: out}
	if opts.Framing != Usernet {
		l.takes = 0
	}
	if opts.MTU > 0 {
		l.longest = min(l.longest, opts.MTU+headerLen+vlanLen)
	}
	return l
}

// Receive waits for frames. They are valid until it is called again. Frames that are none have been left out. The error is io.EOF
// when the other end has closed, io.ErrUnexpectedEOF if it did so within a frame, and wraps
// os.ErrDeadlineExceeded after Interrupt.
func (l *Link) Receive() ([]Frame, error) { return l.in.receive() }

// Send writes frames and waits until they are written. Frames too long for the other end are left out, and so are those whose Virtio
// does not fit: their number is returned. The frames are the caller's again.
func (l *Link) Send(frames []Frame) (dropped int, err error) {
	b := l.buf[:0]
	for i := range frames {
		f := &frames[i]
		if f.check() != nil {
			dropped++
			continue
		}
		if _, longest := wireLen(l.framing, l.takes, f); !l.fits(f, longest) {
			dropped++
			continue
		}
		b = appendFrame(b, l.framing, l.takes, f)
	}
	l.buf = b
	if len(b) == 0 {
		return dropped, nil
	}
	return dropped, l.out.write(b)
}

// fits tells whether f may be sent, whose longest frame on the wire has that many bytes. What is cut at the other end
// is measured by its pieces.
func (l *Link) fits(f *Frame, longest int) bool {
	if f.Virtio.GSOType != GSONone && l.takes.takes(f.Virtio) {
		return min(longest, int(f.Virtio.HdrLen)+int(f.Virtio.GSOSize)) <= l.longest && longest <= MaxFrame
	}
	return longest <= l.longest
}

// Interrupt ends Receive and Send, now and for ever.
func (l *Link) Interrupt() {
	if l.conn.SetDeadline(time.Unix(1, 0)) != nil {
		l.conn.Close() // files without deadlines
	}
}

// Close closes the connection.
func (l *Link) Close() error { return l.conn.Close() }

// files are a connection of two files.
type files struct{ in, out *os.File }

func (f files) SetDeadline(t time.Time) error {
	return errors.Join(f.in.SetDeadline(t), f.out.SetDeadline(t))
}

func (f files) Close() error { return errors.Join(f.in.Close(), f.out.Close()) }

// readSize is how much a stream is read at once, a few of the longest frames: more no longer spares system calls that count, and
// falls out of the processor's cache.
const readSize = 4 * (4 + VirtioLen + MaxFrame)

// maxBatch is how many frames receive returns at most.
const maxBatch = 256

type streamReader struct {
	r          io.Reader
	splitter   splitter
	buf        []byte
	start, end int // of what has been read and not split
	frames     []Frame
	err        error
}

func newStreamReader(r io.Reader, opts Options) *streamReader {
	s := &streamReader{
		r: directly(r), splitter: splitter{framing: opts.Framing},
		buf: make([]byte, max(readSize, len(opts.Early))), frames: make([]Frame, 0, maxBatch),
	}
	s.end = copy(s.buf, opts.Early)
	return s
}

func (s *streamReader) dropped() uint64 { return s.splitter.dropped }

func (s *streamReader) receive() ([]Frame, error) {
	for {
		frames, used, err := s.splitter.split(s.buf[s.start:s.end], s.frames[:0])
		s.start += used
		if len(frames) > 0 {
			return frames, nil // an error comes again
		}
		if err == nil {
			err = s.err
		}
		if err == io.EOF && (s.start < s.end || s.splitter.skip > 0) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
		s.end = copy(s.buf, s.buf[s.start:s.end])
		s.start = 0
		n, err := s.r.Read(s.buf[s.end:])
		s.end, s.err = s.end+n, err
	}
}

// streamWriter writes to a stream. Where the runtime's poller has the descriptor, try works.
type streamWriter struct {
	w   io.Writer
	raw syscall.RawConn // nil: try does nothing

	// The arguments and results of the functions below, which raw calls: closures would be an allocation for each call.
	b       []byte
	parts   vector
	n       int
	err     error
	tryOnce func(fd uintptr) bool
	toEnd   func(fd uintptr) bool
}

func newStreamWriter(w io.Writer) *streamWriter {
	s := &streamWriter{w: w, raw: nonblocking(w)}
	s.tryOnce = func(fd uintptr) bool {
		if len(s.parts) > 0 {
			s.n, s.err = writeVectorNow(fd, s.parts)
		} else {
			s.n, s.err = writeNow(fd, s.b)
		}
		return true
	}
	s.toEnd = s.writeOn
	return s
}

func (s *streamWriter) write(b []byte) error { return s.writeAll(b) }

func (s *streamWriter) try(b []byte) (int, error) {
	if s.raw == nil {
		return 0, nil
	}
	s.b = b
	err := s.raw.Write(s.tryOnce)
	s.b = nil
	if err != nil {
		return 0, err
	}
	return s.n, s.err
}

// tryParts is try for a frame that is in pieces: its prefix, and the frame's.
func (s *streamWriter) tryParts(prefix []byte, f *Frame) (int, error) {
	if s.raw == nil {
		return 0, nil
	}
	s.parts = s.parts[:0].with(prefix).with(f.Head)
	for _, t := range f.Tail {
		s.parts = s.parts.with(t)
	}
	n, err := s.try(nil)
	clear(s.parts)
	s.parts = s.parts[:0]
	return n, err
}
