package gateway

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/usermode/l2"
)

func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		l := &linger{after: 5 * time.Second, end: func() { close(ended) }}
		over := func() bool {
			synctest.Wait()
			select {
			case <-ended:
				return true
			default:
				return false
			}
		}
		time.Sleep(time.Hour)
		if over() {
			t.Fatal("over before the first has come")
		}
		l.enter()
		l.enter()
		l.leave()
		time.Sleep(time.Hour)
		l.leave()
		time.Sleep(4 * time.Second)
		l.enter() // comes back
		time.Sleep(time.Hour)
		if over() {
			t.Fatal("over while somebody is there")
		}
		l.leave()
		time.Sleep(6 * time.Second)
		if !over() {
			t.Error("not over when the last has been gone for 6 s")
		}
		l.stop()
	})
}

func TestLingerForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, l := range []*linger{{}, {after: time.Second}} {
			l.end = func() { t.Error("over") }
			l.enter()
			l.leave()
			l.stop()
			time.Sleep(time.Hour)
		}
	})
}

// frame is one to a multicast address that nobody answers, in HyperKit's framing.
func frame(from l2.MAC) []byte {
	b := binary.LittleEndian.AppendUint16(nil, 14)
	b = append(b, 0x01, 0x80, 0xc2, 0, 0, 0)
	b = append(b, from[:]...)
	return append(b, 0x88, 0xb5)
}

// events listens for notifications.
func events(t *testing.T) (path string, next func() (event, mac string)) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "events.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return path, func() (string, string) {
		t.Helper()
		l.SetDeadline(time.Now().Add(patience))
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		var msg struct {
			Type string `json:"notification_type"`
			MAC  string `json:"mac_address"`
		}
		if err := json.NewDecoder(conn).Decode(&msg); err != nil {
			t.Fatal(err)
		}
		return msg.Type, msg.MAC
	}
}

// patience is how long anything may take on a busy machine.
const patience = time.Minute

// A machine is known by its first frame, and its notifications are in pairs.
func TestMachines(t *testing.T) {
	path, next := events(t)
	log := slog.New(slog.DiscardHandler)
	notifier := gvproxy.NewNotifier(path, log)
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan error, 1)
	go func() { told <- notifier.Run(ctx) }()
	m := newMachines(l2.NewSwitch(l2.Config{}), notifier, log)
	mac := l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	if m.has(mac) || m.has(l2.MAC{}) {
		t.Error("machines before the first has come")
	}
	here, vm := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- m.carry(ctx, l2.Stream(here, l2.Options{}), "test") }()
	if _, err := vm.Write(frame(mac)); err != nil {
		t.Fatal(err)
	}
	if event, got := next(); event != "connection_established" || got != mac.String() {
		t.Errorf("event %s of %s", event, got)
	}
	if !m.has(mac) || !m.has(l2.MAC{}) || m.has(l2.MAC{2}) {
		t.Error("the machine is not known, or another one is")
	}
	if sent, received := m.bytes(); sent != 0 || received != 14 {
		t.Errorf("bytes %d and %d, want 0 and 14", sent, received)
	}
	if _, err := vm.Write(frame(l2.MAC{2})); err != nil { // it is the same machine
		t.Fatal(err)
	}
	vm.Close()
	if err := <-done; err != nil {
		t.Errorf("left: %v", err)
	}
	if event, got := next(); event != "connection_closed" || got != mac.String() {
		t.Errorf("event %s of %s", event, got)
	}
	if _, received := m.bytes(); received != 28 || m.has(mac) {
		t.Error("the machine is still there, or its bytes are not")
	}
	cancel()
	if err := <-told; err != nil {
		t.Error(err)
	}
}
