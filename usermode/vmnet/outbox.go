package vmnet

import (
	"maps"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/usermode/l2"
)

const (
	// outboxSize is how many bytes wait in an outbox at most: what a few connections have in their buffers, which hold it anyway until it is
	// acknowledged.
	outboxSize = 16 << 20
	// sendBuffer is how much of that is one connection's.
	sendBuffer = 1 << 20
	// receiveBuffer is what waits for the host of what a machine has sent on one connection. Half of it is the window: with less, the four
	// processes that a byte passes through wait for each other's turn too often.
	receiveBuffer = 4 << 20
)

// outbox has the packets for a machine that does not read as fast as they come. A goroutine waits for room, and sends them in order.
// Once it is empty it ends. So TCP loses nothing to a machine that is merely slow, and is held back by its own window; and
// what is stuck is stuck here, in nobody's way.
type outbox struct {
	mac  l2.MAC
	lost *atomic.Uint64 // the link's

	mu    sync.Mutex
	queue []*stack.PacketBuffer
	bytes int
	ended bool
}

// put takes pkt, or drops it if there is too much already, unless the outbox has ended.
func (b *outbox) put(pkt *stack.PacketBuffer) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return false
	}
	size := pkt.Size()
	if b.bytes+size > outboxSize {
		b.lost.Add(1)
		return true
	}
	b.bytes += size
	b.queue = append(b.queue, pkt.IncRef())
	return true
}

// postpone puts pkt into the outbox of mac, which it makes if need be. It returns false when the link has ended.
func (l *link) postpone(mac l2.MAC, pkt *stack.PacketBuffer) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return false
	}
	if box := (*l.outboxes.Load())[mac]; box != nil && box.put(pkt) {
		return true
	}
	box := &outbox{mac: mac, lost: &l.lost}
	box.put(pkt)
	l.setLocked(mac, box)
	l.wg.Go(func() { l.empty(box) })
	return true
}

// setLocked makes box the outbox of mac; nil: it has none.
func (l *link) setLocked(mac l2.MAC, box *outbox) {
	boxes := maps.Clone(*l.outboxes.Load())
	if box == nil {
		delete(boxes, mac)
	} else {
		boxes[mac] = box
	}
	l.outboxes.Store(&boxes)
}

// empty sends what is in box until there is nothing left.
func (l *link) empty(box *outbox) {
	s := senders.Get().(*sender)
	defer s.release()
	var batch []*stack.PacketBuffer
	for {
		batch = l.next(box, batch[:0])
		if len(batch) == 0 {
			return
		}
		for _, pkt := range batch {
			if !l.press(s, box.mac, pkt) {
				l.lost.Add(1)
			}
			pkt.DecRef()
		}
	}
}

// next takes what waits. If that is nothing, box has ended.
func (l *link) next(box *outbox, spare []*stack.PacketBuffer) []*stack.PacketBuffer {
	l.mu.Lock()
	defer l.mu.Unlock()
	box.mu.Lock()
	defer box.mu.Unlock()
	batch := box.queue
	box.queue, box.bytes = spare, 0
	if len(batch) > 0 {
		return batch
	}
	box.ended = true
	if (*l.outboxes.Load())[box.mac] == box {
		l.setLocked(box.mac, nil)
	}
	return nil
}

// press sends a packet as soon as its port has room, on whichever that is by then. It returns false when no port has the machine any
// more, or the network has ended.
func (l *link) press(s *sender, mac l2.MAC, pkt *stack.PacketBuffer) bool {
	for {
		if !l.sw.AwaitRoom(mac, l.done) {
			return false
		}
		select {
		case <-l.done:
			return false
		default:
		}
		if s.send(l.sw, pkt) == 0 {
			return true
		}
	}
}
