package l2

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// PortConfig says whose port it is.
type PortConfig struct {
	Name string // for people
	// MACs belong to the port as soon as it runs, even if another one has been seen with them; none of them may be the gateway's.
	MACs []MAC
	// Strict: the port may use no others.
	Strict bool
	// Seen is called once, when the machine's first frame from an address that it may use has come. It must not wait. nil: nobody
	// asks.
	Seen func(MAC)
}

// Port is where a link meets a switch.
type Port struct {
	ID   int // never used again
	Name string

	sw    *Switch
	cfg   PortConfig
	link  *Link
	queue *queue
	slot  int
	flood bucket

	addresses addresses     // the table's
	began     time.Duration // of Switch.now, since Run
	heard     atomic.Int64  // likewise, when frames came last

	// Of the goroutine that reads: the address that was last sent from, as of a state of the table.
	src      MAC
	srcMoves uint64
	seen     bool

	rxFrames, rxBytes, invalid, spoofed, unflooded atomic.Uint64
	txFrames, txBytes, full, unfit                 atomic.Uint64
}

// Stats counts what a port's machine has sent (Rx) and been sent (Tx). Bytes are those of Ethernet frames.
type Stats struct {
	RxFrames, RxBytes uint64
	TxFrames, TxBytes uint64

	Invalid   uint64 // received, not frames: too short, too long, a Virtio that does not fit
	Spoofed   uint64 // received from an address, or with a claim, that is another's
	Unflooded uint64 // received, for everybody, but too many
	Full      uint64 // not sent: the machine does not read fast enough
	Unfit     uint64 // not sent: longer than the link's MTU
}

// NewPort makes a port for l that is not connected before Run.
func (s *Switch) NewPort(l *Link, cfg PortConfig) *Port {
	cfg.MACs = slices.Clone(cfg.MACs)
	return &Port{
		ID: int(s.ids.Add(1)), Name: cfg.Name,
		sw: s, cfg: cfg, link: l, queue: newQueue(l, len(s.slots)),
	}
}

// Run carries frames until the link ends or ctx does, and closes the link. It is to be called once. It returns nil when ctx
// ended, io.EOF when the other end closed, and other errors as they come: ErrFull, ErrClaimed, ErrOutOfStep, of the connection.
func (p *Port) Run(ctx context.Context) (err error) {
	defer func() {
		if cerr := p.link.Close(); cerr != nil && err == nil {
			err = fmt.Errorf("close port %d: %w", p.ID, cerr)
		}
	}()
	p.began = p.sw.now()
	if err := p.sw.add(p); err != nil {
		return err
	}
	defer p.sw.remove(p)
	defer p.sw.table.forget(p)
	for _, mac := range p.cfg.MACs {
		if err := p.sw.table.claim(p, mac); err != nil {
			return fmt.Errorf("port %d: %w", p.ID, err)
		}
	}
	g, running := errgroup.WithContext(ctx)
	var stopping sync.WaitGroup
	stopping.Add(1)
	context.AfterFunc(running, func() {
		defer stopping.Done()
		p.queue.end(errEnded)
		p.link.Interrupt()
	})
	g.Go(p.queue.run)
	g.Go(p.read)
	if p.link.watch != nil {
		g.Go(func() error { return p.link.watch(running) })
	}
	err = g.Wait()
	stopping.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (p *Port) read() error {
	for {
		frames, err := p.link.Receive()
		p.invalid.Store(p.link.in.dropped())
		if err != nil {
			return err
		}
		var bytes uint64
		for i := range frames {
			bytes += uint64(frames[i].Len())
		}
		p.rxFrames.Add(uint64(len(frames)))
		p.rxBytes.Add(bytes)
		p.heard.Store(int64(p.sw.now()))
		p.sw.record(frames)
		p.sw.carry(p, frames)
	}
}

// mayUse tells whether the port's machine may send from mac.
func (p *Port) mayUse(mac MAC) bool {
	moves := p.sw.table.moves.Load()
	if mac == p.src && moves == p.srcMoves && mac != (MAC{}) {
		return true
	}
	if mac == (MAC{}) || mac.group() || mac == p.sw.cfg.GatewayMAC {
		return false
	}
	if p.cfg.Strict && !slices.Contains(p.cfg.MACs, mac) || !p.sw.table.learn(p, mac) {
		return false
	}
	p.src, p.srcMoves = mac, moves
	if !p.seen {
		p.seen = true
		if p.cfg.Seen != nil {
			p.cfg.Seen(mac)
		}
	}
	return true
}

func (p *Port) send(from *Port, frames []Frame, wait bool) (full int) {
	s := p.queue.send(from.slot, frames, wait)
	p.txFrames.Add(s.frames)
	p.txBytes.Add(s.bytes)
	if s.full > 0 {
		p.full.Add(s.full)
	}
	if s.unfit > 0 {
		p.unfit.Add(s.unfit)
	}
	return int(s.full)
}

// Stats returns the counters as they are.
func (p *Port) Stats() Stats {
	return Stats{
		RxFrames: p.rxFrames.Load(), RxBytes: p.rxBytes.Load(),
		TxFrames: p.txFrames.Load(), TxBytes: p.txBytes.Load(),
		Invalid: p.invalid.Load(), Spoofed: p.spoofed.Load(), Unflooded: p.unflooded.Load(),
		Full: p.full.Load(), Unfit: p.unfit.Load(),
	}
}

// What one port may have sent to everybody: enough for who looks for all neighbours in a /22, too little to make work for others.
const (
	floodBurst = 1024
	floodRate  = 1000 // frames a second
)

// bucket holds tokens, one for a frame. The zero value is a full one.
type bucket struct {
	mu    sync.Mutex
	spent float64
	at    time.Time
}

// take takes up to n tokens.
func (b *bucket) take(n int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.spent = max(0, b.spent-floodRate*now.Sub(b.at).Seconds())
	b.at = now
	n = min(n, int(floodBurst-b.spent))
	b.spent += float64(n)
	return n
}
