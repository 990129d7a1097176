package l2

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"
)

// Capture writes frames to a file as libpcap has it: the classic format, with nanoseconds, link type Ethernet. Frames are
// written as they came, those longer than the MTU and without checksums included.
type Capture struct {
	w    io.Writer
	wake chan struct{}

	mu      sync.Mutex
	pending []byte
	dropped uint64
}

// captureSize is how many bytes wait for the file at most; what is more is not captured.
const captureSize = 8 << 20

const (
	pcapMagic    = 0xa1b23c4d // nanoseconds
	pcapEthernet = 1
	pcapRecord   = 16 // bytes in front of a frame
)

// NewCapture makes a capture that writes to w.
func NewCapture(w io.Writer) *Capture {
	c := &Capture{w: w, wake: make(chan struct{}, 1)}
	le := binary.LittleEndian
	b := le.AppendUint32(nil, pcapMagic)
	b = le.AppendUint16(le.AppendUint16(b, 2), 4)                // version
	b = le.AppendUint32(le.AppendUint32(b, 0), 0)                // time zone and accuracy: 0 in practice
	b = le.AppendUint32(le.AppendUint32(b, 1<<18), pcapEthernet) // longest record, link type
	c.pending = b
	c.wake <- struct{}{}
	return c
}

// Run writes until ctx ends, and then what is left. The writer is the caller's to close.
func (c *Capture) Run(ctx context.Context) error {
	var spare []byte
	for {
		ended := false
		select {
		case <-ctx.Done():
			ended = true
		case <-c.wake:
		}
		c.mu.Lock()
		batch := c.pending
		c.pending = spare[:0]
		c.mu.Unlock()
		if _, err := c.w.Write(batch); err != nil {
			return fmt.Errorf("write captured frames: %w", err)
		}
		if ended {
			return nil
		}
		spare = batch
	}
}

// Dropped is the number of frames that came faster than they could be written.
func (c *Capture) Dropped() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dropped
}

func (c *Capture) record(frames []Frame) {
	now := time.Now()
	le := binary.LittleEndian
	c.mu.Lock()
	for i := range frames {
		n := frames[i].Len()
		if len(c.pending)+pcapRecord+n > captureSize {
			c.dropped++
			continue
		}
		b := le.AppendUint32(c.pending, uint32(now.Unix()))
		b = le.AppendUint32(b, uint32(now.Nanosecond()))
		b = le.AppendUint32(le.AppendUint32(b, uint32(n)), uint32(n))
		c.pending = frames[i].appendTo(b)
	}
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
