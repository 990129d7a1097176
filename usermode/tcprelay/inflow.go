package tcprelay

import (
	"io"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// inflow is what can be read from the host at the moment. Its length is exact, which netstack relies on.
type inflow interface {
	tcpip.Payloader
	// wait waits until there is something to read. io.EOF says that nothing will come.
	wait() error
	// drop lets go of memory.
	drop()
}

// readInflow is the inflow of anything that can be read. It reads into a block of its own, which netstack then copies: a small
// one while little comes, so that an idle connection holds little.
type readInflow struct {
	conn  io.Reader
	small *[relayHead]byte  // one of
	large *[relayChunk]byte // these two
	rest  []byte            // of what was read
	more  bool              // the last time the small block was full
	err   error
}

var smallBlocks = sync.Pool{New: func() any { return new([relayHead]byte) }}

func newReadInflow(c io.Reader) *readInflow { return &readInflow{conn: c} }

func (in *readInflow) wait() error {
	in.drop()
	if in.err != nil {
		return in.err
	}
	b := in.block()
	for {
		n, err := in.conn.Read(b)
		in.rest, in.err = b[:n], err
		if n > 0 {
			in.more = n >= relayHead
			return nil // an error comes again
		}
		if err != nil {
			return err
		}
	}
}

func (in *readInflow) block() []byte {
	if in.more {
		in.large = chunks.Get().(*[relayChunk]byte)
		return in.large[:]
	}
	in.small = smallBlocks.Get().(*[relayHead]byte)
	return in.small[:]
}

func (in *readInflow) drop() {
	if in.small != nil {
		smallBlocks.Put(in.small)
	}
	if in.large != nil {
		chunks.Put(in.large)
	}
	in.small, in.large, in.rest = nil, nil, nil
}

// Len is how many bytes Read can give.
func (in *readInflow) Len() int { return len(in.rest) }

// Read gives what there is.
func (in *readInflow) Read(p []byte) (int, error) {
	n := copy(p, in.rest)
	in.rest = in.rest[n:]
	return n, nil
}
