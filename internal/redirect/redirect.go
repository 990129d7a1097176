// Package redirect turns connections to ports of the host that somebody else holds for us towards ports that we listen on.
// Rootful Podman is such a holder: it binds a published port before it asks for the network, and keeps the socket. The
// client's address stays as it is, and so does the destination's but for its port.
//
// It is an nftables table of our own in the calling process's network namespace, two maps and the rules that look into
// them, so a port costs one element. It comes after the destination NAT of others and takes what they left. The ports that we
// listen on are for the redirected only: whoever calls one of them by its number is refused.
package redirect

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"

	"github.com/usernet/usernet"
)

// Port is one redirection.
type Port struct {
	Proto usernet.Proto
	Addr  netip.Addr // of the host; the unspecified address is all of its family
	Port  uint16     // what clients dial
	To    uint16     // what we listen on, at the same address
}

// entry is what a redirection is known by: no two can have it.
type entry struct {
	proto usernet.Proto
	at    netip.AddrPort
}

// Table is all redirections of the process. Its zero value has none and is ready for use. It is safe for concurrent
// use.
type Table struct {
	mu     sync.Mutex // held while the kernel is told
	owners map[string]map[entry]uint16
	have   map[entry]uint16 // what the kernel was told; nil: there is no table, or it is not known what is in it
}

// Set makes ports the redirections of owner, in place of those it had.
func (t *Table) Set(owner string, ports []Port) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	mine := make(map[entry]uint16, len(ports))
	for _, p := range ports {
		e := entry{p.Proto, netip.AddrPortFrom(p.Addr, p.Port)}
		if !e.valid() || p.To == 0 {
			return fmt.Errorf("redirect %s/%s: %w", e.at, e.proto, usernet.ErrInvalid)
		}
		for other, theirs := range t.owners {
			if _, taken := theirs[e]; taken && other != owner {
				return fmt.Errorf("redirect %s/%s: %w by %s", e.at, e.proto, usernet.ErrPortTaken, other)
			}
		}
		mine[e] = p.To
	}
	if t.owners == nil {
		t.owners = map[string]map[entry]uint16{}
	}
	old, had := t.owners[owner]
	t.owners[owner] = mine
	if len(mine) == 0 {
		delete(t.owners, owner)
	}
	err := t.applyLocked()
	if err != nil && had {
		t.owners[owner] = old
	} else if err != nil {
		delete(t.owners, owner)
	}
	return err
}

func (e entry) valid() bool {
	a := e.at.Addr()
	return (e.proto == usernet.TCP || e.proto == usernet.UDP) && e.at.Port() != 0 && a.IsValid() && a == a.Unmap().WithZone("")
}

// wantLocked is what the kernel shall have.
func (t *Table) wantLocked() map[entry]uint16 {
	want := map[entry]uint16{}
	for _, ports := range t.owners {
		maps.Copy(want, ports)
	}
	return want
}

// applyLocked tells the kernel what has changed since it was last told.
func (t *Table) applyLocked() error {
	want := t.wantLocked()
	switch {
	case len(want) == 0 && len(t.have) == 0:
		return nil
	case len(want) == 0 || t.have == nil:
		return t.replaceLocked(want)
	}
	gone, come := missing(t.have, want), missing(want, t.have)
	old, now := private(t.have), private(want)
	t.have = nil
	k := newKernel()
	if err := errors.Join(k.delete(gone, missing(old, now)), k.add(come, missing(now, old))); err != nil {
		// Somebody was at our table.
		return t.replaceLocked(want)
	}
	t.have = want
	return nil
}

// replaceLocked declares the whole table anew, or removes it when there is nothing to redirect.
func (t *Table) replaceLocked(want map[entry]uint16) error {
	t.have = nil
	k := newKernel()
	if err := k.declare(len(want) > 0); err != nil {
		return err
	}
	if err := k.add(want, private(want)); err != nil {
		return err
	}
	t.have = want
	return nil
}

// missing is what is in a and not, or not the same, in b.
func missing[K comparable](a, b map[K]uint16) map[K]uint16 {
	m := map[K]uint16{}
	for k, v := range a {
		if other, ok := b[k]; !ok || other != v {
			m[k] = v
		}
	}
	return m
}

// listener is a port that we listen on; several redirections can lead there.
type listener struct {
	proto usernet.Proto
	port  uint16
}

func private(entries map[entry]uint16) map[listener]uint16 {
	m := map[listener]uint16{}
	for e, to := range entries {
		m[listener{e.proto, to}] = to
	}
	return m
}

// Sweep removes the table that an earlier process left, if there is nothing to redirect now.
func (t *Table) Sweep() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.owners) > 0 || t.have != nil {
		return nil
	}
	k := newKernel()
	if there, err := k.exists(); err != nil || !there {
		return err
	}
	return k.declare(false)
}

// Check compares the kernel's table with what was set and puts it back if somebody flushed it. It reports whether that
// was necessary.
func (t *Table) Check() (repaired bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	want := t.wantLocked()
	if len(want) == 0 && len(t.have) == 0 {
		return false, nil
	}
	whole, err := newKernel().has(want)
	if err != nil || whole && t.have != nil {
		return false, err
	}
	return true, t.replaceLocked(want)
}
