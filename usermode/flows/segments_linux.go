package flows

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nonblock"
)

// segments are a burst of which the kernel gets all datagrams by one call.
type segments struct {
	nonblock.Segments
	iovecs [nonblock.MaxSegments]unix.Iovec
}

var segmentsPool = sync.Pool{New: func() any { return new(segments) }}

// areSegments tells whether datagrams go together: all but the last have the same length, and that has no more.
func areSegments(payloads [][]byte) bool {
	n := len(payloads)
	if n < 2 || n > nonblock.MaxSegments || !nonblock.CutsDatagrams() {
		return false
	}
	size, last := len(payloads[0]), len(payloads[n-1])
	for _, p := range payloads[:n-1] {
		if len(p) != size {
			return false
		}
	}
	return 0 < last && last <= size && (n-1)*size+last <= maxDatagram-ipv4HdrLen-udpHdrLen
}

// sendSegments sends datagrams that go together on a connected socket, all of them or none. It does not wait.
func sendSegments(fd int, payloads [][]byte) error {
	s := segmentsPool.Get().(*segments)
	defer segmentsPool.Put(s)
	iovecs := s.iovecs[:len(payloads)]
	defer clear(iovecs)
	for i, p := range payloads {
		iovecs[i] = nonblock.Iovec(p)
	}
	return s.Send(fd, iovecs, len(payloads[0]))
}
