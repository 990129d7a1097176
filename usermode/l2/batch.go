package l2

// Batch is frames for a link's other end, in the form in which it carries them: whoever reads frames from a device reads them straight
// into it. It is for one goroutine, the one that would use Send.
type Batch struct {
	link *Link
	size int // bytes from which on it is full
	b    []byte
	n    int // frames
	flat []byte
}

// maxPrefix is the longest of all framings' prefixes.
const maxPrefix = 4 + VirtioLen

// NewBatch makes a batch that takes frames until it has size bytes.
func (l *Link) NewBatch(size int) *Batch {
	return &Batch{link: l, size: size, b: make([]byte, 0, size+maxPrefix+MaxFrame)}
}

// Next returns room for the longest frame, or nil if the batch is full: it has its size, or maxBatch frames.
func (b *Batch) Next() []byte {
	if len(b.b) >= b.size || b.n == maxBatch || cap(b.b)-len(b.b) < maxPrefix+MaxFrame {
		return nil
	}
	start := len(b.b) + b.link.framing.prefixLen()
	return b.b[start : start+MaxFrame]
}

// Add adds a frame, the first n bytes of what Next has returned. One that Send would leave out is left out: Add tells whether it has been
// added.
func (b *Batch) Add(n int, v Virtio) bool {
	l, start := b.link, len(b.b)
	f := Frame{Virtio: v, Head: b.Next()[:n]}
	if n < headerLen || f.check() != nil {
		return false
	}
	if _, longest := wireLen(l.framing, l.takes, &f); !l.fits(&f, longest) {
		return false
	}
	b.n++
	if l.takes.takes(f.Virtio) {
		l.framing.appendPrefix(b.b, n, f.Virtio)
		b.b = b.b[:start+l.framing.prefixLen()+n]
		return true
	}
	// It becomes longer, or several.
	b.flat = append(b.flat[:0], f.Head...)
	f.Head = b.flat
	b.b = appendFrame(b.b, l.framing, l.takes, &f)
	return true
}

// Len is the number of frames in it.
func (b *Batch) Len() int { return b.n }

// SendBatch is Send for a batch, which is empty then.
func (l *Link) SendBatch(b *Batch) error {
	defer func() { b.b, b.n = b.b[:0], 0 }()
	if b.n == 0 {
		return nil
	}
	return l.out.write(b.b)
}
