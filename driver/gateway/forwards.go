package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
)

// Limits on the forwards that guests make. Each is a socket of this process.
const (
	maxForwardsGuest  = 4096
	maxForwardsGuests = 16384
)

// absence is how long a guest may be gone before the forwards that it has made go too. gvproxy keeps them, or rather it ends with its
// guest. A guest whose agent starts again finds what it had. One that boots makes its forwards anew, and one that is no
// more must not hold ports of the host for ever.
const absence = time.Minute

// forwards is the table of what is forwarded. A key is in it from before its forward is opened until after it has been closed.
type forwards struct {
	open func(ctx context.Context, f gvproxy.Forward) (io.Closer, error)

	mu     sync.Mutex
	table  map[gvproxy.Key]*entry
	guests map[netip.Addr]int // entries that guests have made
	ended  bool               // nothing may be added any more
}

type entry struct {
	gvproxy.Forward
	guest  netip.Addr // which has asked for it; zero: the host has
	socket io.Closer  // nil: it is being opened or closed
	seen   time.Time  // when the guest was last there
}

var errEnding = errors.New("the gateway is stopping")

func newForwards(open func(ctx context.Context, f gvproxy.Forward) (io.Closer, error)) *forwards {
	return &forwards{open: open, table: make(map[gvproxy.Key]*entry), guests: make(map[netip.Addr]int)}
}

// all returns what is open.
func (t *forwards) all() []gvproxy.Forward {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []gvproxy.Forward
	for _, e := range t.table {
		if e.socket != nil {
			all = append(all, e.Forward)
		}
	}
	return all
}

// add opens a forward for a guest, or for the host. What a guest has already, it may ask for again: after it was started again, it
// does not know what it has.
func (t *forwards) add(ctx context.Context, f gvproxy.Forward, guest netip.Addr) error {
	e := &entry{Forward: f, guest: guest, seen: time.Now()}
	if have, err := t.reserve(e); have || err != nil {
		return err
	}
	socket, err := t.open(ctx, f)
	t.mu.Lock()
	if err == nil && !t.ended {
		e.socket = socket
		t.mu.Unlock()
		return nil
	}
	t.deleteLocked(e)
	t.mu.Unlock()
	if err == nil {
		err = errors.Join(errEnding, socket.Close())
	}
	return err
}

// reserve puts e into the table, or tells that the guest has the same already.
func (t *forwards) reserve(e *entry) (have bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return false, errEnding
	}
	if old := t.table[e.Key]; old != nil {
		if e.guest.IsValid() && old.guest == e.guest && old.Target == e.Target && old.socket != nil {
			old.seen = e.seen
			return true, nil
		}
		return false, usernet.ErrExists
	}
	if e.guest.IsValid() {
		total := 0
		for _, n := range t.guests {
			total += n
		}
		if t.guests[e.guest] >= maxForwardsGuest || total >= maxForwardsGuests {
			return false, fmt.Errorf("too many forwards: %d to %s, %d to all guests", t.guests[e.guest], e.guest, total)
		}
		t.guests[e.guest]++
	}
	t.table[e.Key] = e
	return false, nil
}

func (t *forwards) deleteLocked(e *entry) {
	delete(t.table, e.Key)
	if e.guest.IsValid() {
		if t.guests[e.guest]--; t.guests[e.guest] == 0 {
			delete(t.guests, e.guest)
		}
	}
}

// remove closes a forward; with a valid to, only if it leads there.
func (t *forwards) remove(key gvproxy.Key, to netip.Addr) error {
	t.mu.Lock()
	e := t.table[key]
	if e == nil || e.socket == nil || to.IsValid() && to != e.Target.Addr() {
		t.mu.Unlock()
		return usernet.ErrNotFound
	}
	socket := e.socket
	e.socket = nil
	t.mu.Unlock()
	return t.close(e, socket)
}

// close closes the socket of an entry that has none any more, and gives its key free.
func (t *forwards) close(e *entry, socket io.Closer) error {
	err := socket.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.deleteLocked(e)
	return err
}

// expire closes what guests have made that are gone for too long.
func (t *forwards) expire(now time.Time, present func(guest netip.Addr) bool) (expired []gvproxy.Forward) {
	there := make(map[netip.Addr]bool)
	t.mu.Lock()
	for guest := range t.guests {
		there[guest] = false
	}
	t.mu.Unlock()
	for guest := range there {
		there[guest] = present(guest)
	}
	sockets := make(map[*entry]io.Closer)
	t.mu.Lock()
	for _, e := range t.table {
		switch {
		case !e.guest.IsValid() || e.socket == nil:
		case there[e.guest]:
			e.seen = now
		case now.Sub(e.seen) >= absence:
			sockets[e], e.socket = e.socket, nil
			expired = append(expired, e.Forward)
		}
	}
	t.mu.Unlock()
	for e, socket := range sockets {
		t.close(e, socket)
	}
	return expired
}

// end closes everything. Nothing can be added afterwards.
func (t *forwards) end() error {
	var errs []error
	sockets := make(map[*entry]io.Closer)
	t.mu.Lock()
	t.ended = true
	for _, e := range t.table {
		if e.socket != nil {
			sockets[e], e.socket = e.socket, nil
		}
	}
	t.mu.Unlock()
	for e, socket := range sockets {
		if err := t.close(e, socket); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// holder says whose a port of the host is, if a forward has it.
func (t *forwards) holder(proto gvproxy.Proto, at netip.AddrPort) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.table {
		if e.Proto == proto && covers(e.Local, at) {
			return fmt.Sprintf("a forward from %s to %s", e.Local, e.Remote)
		}
	}
	return ""
}

// covers tells whether who listens at local, HOST:PORT, is in the way of who wants to listen at at.
func covers(local string, at netip.AddrPort) bool {
	host, port, err := net.SplitHostPort(local)
	if err != nil || port != strconv.Itoa(int(at.Port())) {
		return false
	}
	a, err := netip.ParseAddr(host)
	return err != nil || a.IsUnspecified() || !at.Addr().IsValid() || at.Addr().IsUnspecified() || a.Unmap() == at.Addr().Unmap()
}
