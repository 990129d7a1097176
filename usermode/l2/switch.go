package l2

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Gateway is the switch's own port: what the machines are connected to it for.
type Gateway interface {
	// Deliver takes frames for the gateway's address, and those for everybody. They are valid until it returns. Each port's
	// goroutine calls it, at the same time as others; while it has not returned, that port's machine waits, and no other. Any
	// Virtio fits its frame.
	Deliver(from *Port, frames []Frame)
}

// Config is what a Switch is made of.
type Config struct {
	GatewayMAC MAC
	Gateway    Gateway // nil: there is none, and machines only reach each other
	// GatewayAddrs are what no machine may pretend to another one to have, by ARP or neighbour discovery.
	GatewayAddrs []netip.Addr
	// GatewayWaits lets Send wait for a machine that is slower than the gateway, as frames of other machines do, instead of losing
	// frames: as long as it reads on, and not for broadcasts. Of use where nobody else waits for the goroutine that sends.
	GatewayWaits bool
	// Isolated machines reach the gateway only, not each other.
	Isolated bool
	// MaxPorts is the number of ports that run at the same time at most; 0: 256.
	MaxPorts int
	// MACsPerPort is how many addresses are learned for each port, which then forgets its oldest; 0: 64.
	MACsPerPort int
}

// Switch carries frames between ports and a gateway. Frames to an address are sent where it has been seen; groups,
// broadcasts and unknown addresses to all, so many in a second for each sender.
type Switch struct {
	cfg     Config
	guard   guard
	table   table
	capture atomic.Pointer[Capture]
	gateway *Port // stands for the gateway as a sender; it has no link
	ids     atomic.Int64
	started time.Time

	ports atomic.Pointer[[]*Port] // running; never changed, but replaced

	mu    sync.Mutex
	slots []bool // of ports in use; the first is the gateway's
}

// ErrFull says that MaxPorts ports are running.
var ErrFull = errors.New("switch is full")

// NewSwitch makes a switch without ports.
func NewSwitch(cfg Config) *Switch {
	if cfg.MaxPorts == 0 {
		cfg.MaxPorts = 256
	}
	if cfg.MACsPerPort == 0 {
		cfg.MACsPerPort = 64
	}
	s := &Switch{
		cfg:   cfg,
		guard: newGuard(cfg.GatewayAddrs),
		slots: make([]bool, 1+cfg.MaxPorts), started: time.Now(),
	}
	s.table = table{limit: cfg.MACsPerPort, quiet: quietAfter, now: s.now, entries: make(map[MAC]*entry)}
	s.slots[0] = true
	s.gateway = &Port{sw: s}
	s.ports.Store(new([]*Port))
	return s
}

// Ports returns the ports that are running.
func (s *Switch) Ports() []*Port { return slices.Clone(*s.ports.Load()) }

// Table tells behind which port, by its ID, each address has been seen.
func (s *Switch) Table() map[MAC]int { return s.table.dump() }

// PortOf returns the port behind which mac has been seen, nil if there is none.
func (s *Switch) PortOf(mac MAC) *Port { return s.table.portOf(mac) }

// now is a clock that begins with the switch.
func (s *Switch) now() time.Duration { return time.Since(s.started) }

// Capture lets c have a copy of every frame from now on; nil ends that.
func (s *Switch) Capture(c *Capture) { s.capture.Store(c) }

// Send sends frames of the gateway's; those whose Virtio does not fit are left out. They are the caller's again. It returns how
// many ports had no room for how many frames.
func (s *Switch) Send(frames []Frame) (full int) {
	s.record(frames)
	return s.carry(s.gateway, frames)
}

// AwaitRoom waits until there may be room again for frames to mac that Send had none for, or done is closed: for senders that have a
// goroutine for each machine, and may wait for one that does not read at all. It returns false when no port has mac any more.
func (s *Switch) AwaitRoom(mac MAC, done <-chan struct{}) bool {
	p := s.table.portOf(mac)
	if p == nil {
		return false
	}
	room := p.queue.awaited()
	if s.table.portOf(mac) == p { // or nobody would tell that it has moved
		select {
		case <-room:
		case <-done:
		}
	}
	return s.table.portOf(mac) != nil
}

func (s *Switch) record(frames []Frame) {
	if c := s.capture.Load(); c != nil {
		c.record(frames)
	}
}

// dest is where a frame goes.
type dest struct {
	kind  destKind
	entry *entry // toPort
}

type destKind uint8

const (
	nowhere destKind = iota
	toPort
	toGateway
	toAll     // and the gateway
	toUnknown // to all but the gateway
)

// carry sends frames on, those in a row that go to the same place at once.
func (s *Switch) carry(from *Port, frames []Frame) (full int) {
	var last lookup
	start, to := 0, dest{}
	for i := range frames {
		d := s.destination(from, &frames[i], &last)
		if d != to {
			full += s.deliver(from, to, frames[start:i])
			start, to = i, d
		}
	}
	return full + s.deliver(from, to, frames[start:])
}

// lookup is the last result of the table, which is good for a batch: most of it goes to one place.
type lookup struct {
	dst MAC // zero: none yet
	to  dest
}

func (s *Switch) destination(from *Port, f *Frame, last *lookup) dest {
	dst := f.dst()
	if from == s.gateway {
		if f.check() != nil {
			return dest{}
		}
	} else {
		if !from.mayUse(f.src()) {
			from.spoofed.Add(1)
			return dest{}
		}
		if dst == s.cfg.GatewayMAC {
			return dest{kind: toGateway}
		}
		if s.guard.stops(f) {
			from.spoofed.Add(1)
			return dest{}
		}
	}
	if dst.group() {
		return dest{kind: toAll}
	}
	if dst != last.dst {
		last.dst, last.to = dst, dest{kind: toUnknown}
		if e := s.table.lookup(dst); e != nil {
			last.to = dest{kind: toPort, entry: e}
		}
	}
	return last.to
}

func (s *Switch) deliver(from *Port, to dest, frames []Frame) (full int) {
	if len(frames) == 0 {
		return 0
	}
	switch to.kind {
	case toPort:
		if to.entry.port == from || s.cfg.Isolated && from != s.gateway {
			return 0
		}
		for _, p := range to.entry.older {
			if p != from {
				p.send(from, frames, false)
			}
		}
		return to.entry.port.send(from, frames, from != s.gateway || s.cfg.GatewayWaits)
	case toGateway:
		s.toGateway(from, frames)
	case toAll, toUnknown:
		if to.kind == toAll && from != s.gateway {
			s.toGateway(from, frames)
		}
		return s.sendAll(from, to, frames)
	}
	return 0
}

func (s *Switch) toGateway(from *Port, frames []Frame) {
	if s.cfg.Gateway != nil {
		s.cfg.Gateway.Deliver(from, frames)
	}
}

// sendAll sends frames to all ports but from. What the gateway sends to groups is not limited: machines cannot make it.
func (s *Switch) sendAll(from *Port, to dest, frames []Frame) (full int) {
	if s.cfg.Isolated && from != s.gateway {
		return 0
	}
	if from != s.gateway || to.kind == toUnknown {
		n := from.flood.take(len(frames))
		from.unflooded.Add(uint64(len(frames) - n))
		frames = frames[:n]
	}
	for _, p := range *s.ports.Load() {
		if p != from {
			full += p.send(from, frames, false)
		}
	}
	return full
}

// add makes p one of the running ports.
func (s *Switch) add(p *Port) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	slot := slices.Index(s.slots, false)
	if slot < 0 {
		return fmt.Errorf("%d ports: %w", s.cfg.MaxPorts, ErrFull)
	}
	s.slots[slot], p.slot = true, slot
	ports := append(slices.Clone(*s.ports.Load()), p)
	s.ports.Store(&ports)
	return nil
}

// remove undoes add. Frames may still be on their way to p, which does not take any.
func (s *Switch) remove(p *Port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots[p.slot] = false
	ports := slices.DeleteFunc(slices.Clone(*s.ports.Load()), func(o *Port) bool { return o == p })
	s.ports.Store(&ports)
}
