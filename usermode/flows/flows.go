// Package flows carries the UDP flows and the ICMP echo requests of virtual machines on, by ordinary sockets of the host
// that need no privileges, on Linux, macOS and Windows. What comes back, answers and errors, is handed to whoever sends
// packets to the guests. It makes and reads no packets, but for ICMP errors and what they quote: that is its user's.
package flows

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/usernet/usernet/internal/icmperror"
)

// Config says what flows need of their surroundings. All functions are called by many goroutines, and must not wait.
type Config struct {
	// Resolve returns the host's address to dial for what a guest dialled; false: the guest may not.
	Resolve func(dst netip.Addr) (netip.Addr, bool)
	// SendUDP sends datagrams of up to 64 KiB each to a guest, in their order: from what it dialled, to its port. The payloads
	// are the caller's again when it returns.
	SendUDP func(from, to netip.AddrPort, payloads [][]byte)
	// SendICMP sends a complete ICMP message to a guest, of the version that the addresses are, with its checksum. The
	// message is the caller's again when it returns. It must not call Flows.
	SendICMP func(from, to netip.Addr, message []byte)
	Log      *slog.Logger
}

// Flows are the UDP flows and echo requests under way. Its methods are safe for concurrent use.
type Flows struct {
	cfg     Config
	errors  icmperror.Limit
	udp     *udpTable
	echo4   *echoSocket
	echo6   *echoSocket
	started time.Time

	pollers pollers

	mu      sync.Mutex
	running bool
	tasks   sync.WaitGroup // Add only while running, under mu
}

// New makes Flows, which drop everything until Run is called.
func New(cfg Config) *Flows {
	f := &Flows{cfg: cfg, started: time.Now()}
	f.udp = newUDPTable(f)
	waiting := newQuota(maxEchoes, maxClientEchoes)
	f.echo4, f.echo6 = newEchoSocket(f, true, waiting), newEchoSocket(f, false, waiting)
	return f
}

// Run carries flows on until ctx is done; then all of them end, and with them every socket and goroutine. It must be
// called once.
func (f *Flows) Run(ctx context.Context) error {
	if err := f.pollers.open(f); err != nil {
		return err
	}
	f.mu.Lock()
	f.running = true
	f.mu.Unlock()
	f.udp.accept(true)

	tick := time.NewTicker(expiryInterval)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			f.udp.expire()
			f.echo4.sweep()
			f.echo6.sweep()
		}
	}

	f.mu.Lock()
	f.running = false
	f.mu.Unlock()
	f.udp.accept(false)
	err := errors.Join(f.echo4.close(), f.echo6.close(), f.pollers.close())
	f.tasks.Wait()
	return err
}

func (f *Flows) isRunning() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.running
}

// now is the time since New.
func (f *Flows) now() time.Duration { return time.Since(f.started) }

// UDP carries datagrams of a guest on, which it has sent one behind the other to the same destination. hops is the TTL or hop
// limit that is left for each; quoted are the IP and UDP headers of the first, for ICMP errors. All of this is the caller's again
// when it returns, which it does without waiting. Where the datagrams must not be cut (DF), the host does not cut them either.
func (f *Flows) UDP(client, dst netip.AddrPort, hops uint8, quoted []byte, payloads [][]byte) {
	b := burst{client: client, dst: dst, hops: hops, whole: isWhole(quoted), quoted: quoted, payloads: payloads}
	f.udp.forward(&b)
}

// Echo carries an echo request of a guest on. message is the whole ICMP message; the rest is as UDP has it.
func (f *Flows) Echo(client, dst netip.Addr, hops uint8, ipHeader, message []byte) {
	s := f.echo6
	if dst.Is4() {
		s = f.echo4
	}
	s.forward(&ping{client: client, dst: dst, hops: hops, whole: isWhole(ipHeader), header: ipHeader, message: message})
}

// Stats are for people who wonder where packets stay. All but Flows and Echoes count from the beginning.
type Stats struct {
	Flows       int    // UDP flows, now
	Evicted     uint64 // flows that made room for others
	Refused     uint64 // datagrams for which no flow could be opened, or was allowed
	Dropped     uint64 // datagrams that the host's socket did not take
	Echoes      int    // requests without an answer, now
	EchoRefused uint64 // requests that were broken, one too many, not allowed, or not taken
	Errors      uint64 // ICMP errors to guests
	ErrorsHeld  uint64 // those that were one too many
}

// Stats may be called at any time.
func (f *Flows) Stats() Stats {
	s := Stats{
		Evicted: f.udp.evicted.Load(), Refused: f.udp.refused.Load(), Dropped: f.udp.dropped.Load(),
		EchoRefused: f.echo4.refused.Load() + f.echo6.refused.Load(),
		Errors:      f.errors.Sent.Load(), ErrorsHeld: f.errors.Held.Load(),
	}
	s.Flows = f.udp.count()
	s.Echoes = f.echo4.waiting.count()
	return s
}

// report sends e, about a packet of client's to dst, to the client, unless it got too many. quoted is that packet, as far
// as there is something of it.
func (f *Flows) report(e icmperror.Message, client, dst netip.Addr, quoted ...[]byte) {
	if !f.errors.Take(client, time.Now()) {
		return
	}
	if !e.From.IsValid() || e.From.Is4() != client.Is4() {
		e.From = dst
	}
	var b [maxError6]byte
	f.cfg.SendICMP(e.From, client, putError(b[:], e, client, quoted...))
}
