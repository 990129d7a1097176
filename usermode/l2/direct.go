package l2

// directLen is the length from which on a frame is written from where it is: to gather a shorter one costs more than to copy it.
const directLen = 4 << 10

// partsWriter is a sender that writes a frame from where it is. What it has not written, the caller keeps.
type partsWriter interface {
	tryParts(prefix []byte, f *Frame) (int, error)
}

// directLocked writes a long frame without copying it, as far as that goes without waiting; the rest is pending then. It returns false
// if f cannot go that way: something waits before it, it has to be finished, or it would not be worth it.
func (q *queue) directLocked(source int, f *Frame) bool {
	n := f.Len()
	if q.busy || len(q.pending) > 0 || n < directLen || !q.link.takes.takes(f.Virtio) {
		return false
	}
	out, ok := q.link.out.(partsWriter)
	if !ok {
		return false
	}
	q.pending = q.link.framing.appendPrefix(q.pending, n, f.Virtio)
	whole := len(q.pending) + n
	done, err := out.tryParts(q.pending, f)
	if done == whole && err == nil {
		q.pending = q.pending[:0]
		q.earnLocked(done)
		return true
	}
	q.pending = f.appendTo(q.pending)
	q.share[source] += whole
	q.wroteLocked(done, err)
	return true
}
