package gateway

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/usermode/l2"
)

// machines are those that are connected.
type machines struct {
	sw     *l2.Switch
	events *gvproxy.Notifier
	log    *slog.Logger

	mu             sync.Mutex
	running        map[*machine]struct{}
	sent, received uint64 // bytes, of those that have left
}

type machine struct {
	port *l2.Port
	mac  l2.MAC // that it was first seen with; zero: not yet
}

func newMachines(sw *l2.Switch, events *gvproxy.Notifier, log *slog.Logger) *machines {
	return &machines{sw: sw, events: events, log: log, running: make(map[*machine]struct{})}
}

// carry has a machine on the network until its link ends or ctx does, and closes the link. That the other end has closed is no error.
func (m *machines) carry(ctx context.Context, link *l2.Link, name string) error {
	vm := &machine{}
	vm.port = m.sw.NewPort(link, l2.PortConfig{Name: name, Seen: func(mac l2.MAC) { m.seen(vm, mac) }})
	m.mu.Lock()
	m.running[vm] = struct{}{}
	m.mu.Unlock()
	m.log.Debug("machine connected", "by", name, "port", vm.port.ID)
	err := vm.port.Run(ctx)
	if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	m.left(vm, err)
	return err
}

func (m *machines) seen(vm *machine, mac l2.MAC) {
	m.mu.Lock()
	vm.mac = mac
	m.mu.Unlock()
	m.log.Info("machine on the network", "mac", mac, "by", vm.port.Name, "port", vm.port.ID)
	m.events.Send(gvproxy.ConnectionEstablished, gvproxy.MAC(mac))
}

func (m *machines) left(vm *machine, err error) {
	stats := vm.port.Stats()
	m.mu.Lock()
	delete(m.running, vm)
	m.sent += stats.TxBytes
	m.received += stats.RxBytes
	mac := vm.mac
	m.mu.Unlock()
	if mac == (l2.MAC{}) {
		return
	}
	m.log.Info("machine left", "mac", mac, "by", vm.port.Name, "port", vm.port.ID, "err", err)
	m.events.Send(gvproxy.ConnectionClosed, gvproxy.MAC(mac))
}

// has tells whether a machine is there, as far as that is known: one that has not spoken may be it. The zero value is any machine.
func (m *machines) has(mac l2.MAC) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if mac == (l2.MAC{}) {
		return len(m.running) > 0
	}
	for vm := range m.running {
		if vm.mac == (l2.MAC{}) {
			return true
		}
	}
	return m.sw.PortOf(mac) != nil
}

// bytes have been sent to machines, and received from them.
func (m *machines) bytes() (sent, received uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	sent, received = m.sent, m.received
	for vm := range m.running {
		stats := vm.port.Stats()
		sent += stats.TxBytes
		received += stats.RxBytes
	}
	return sent, received
}

// linger ends something when the last of those who were there has been gone for a while.
type linger struct {
	after time.Duration // 0: never
	end   func()

	mu    sync.Mutex
	there int
	timer *time.Timer
}

func (l *linger) enter() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.there++
	if l.timer != nil {
		l.timer.Stop()
	}
}

func (l *linger) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.there--; l.there > 0 || l.after == 0 {
		return
	}
	l.timer = time.AfterFunc(l.after, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.there == 0 {
			l.end()
		}
	})
}

// stop ends the waiting.
func (l *linger) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.after = 0
	if l.timer != nil {
		l.timer.Stop()
	}
}
