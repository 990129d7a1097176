package gvproxy_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/driver/gvproxy/cli"
)

// host is a gateway that really listens for forwards, so that its errors are the kernel's, and carries nothing.
type host struct {
	mu       sync.Mutex
	forwards map[gvproxy.Key]exposed
	zones    []gvproxy.Zone
	leases   map[netip.Addr]gvproxy.MAC
	cam      map[gvproxy.MAC]int
	events   *gvproxy.Notifier
}

type exposed struct {
	gvproxy.Forward
	socket io.Closer
}

// newHost is the host that a command line asks for. Its forwards are listened for, as gvproxy does at its start.
func newHost(ctx context.Context, g cli.Gvproxy) (*host, error) {
	h := &host{
		forwards: make(map[gvproxy.Key]exposed), zones: g.Network.Zones, cam: make(map[gvproxy.MAC]int),
		leases: map[netip.Addr]gvproxy.MAC{g.Network.Gateway: g.Network.GatewayMAC},
		events: gvproxy.NewNotifier(g.Notify, slog.New(slog.DiscardHandler)),
	}
	maps.Copy(h.leases, g.Network.Leases)
	for _, f := range g.Network.Forwards {
		if err := h.Expose(ctx, f); err != nil {
			return nil, errors.Join(err, h.Close())
		}
	}
	return h, nil
}

func (h *host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for _, e := range h.forwards {
		errs = append(errs, e.socket.Close())
	}
	return errors.Join(errs...)
}

func (h *host) Forwards() []gvproxy.Forward {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []gvproxy.Forward
	for _, e := range h.forwards {
		all = append(all, e.Forward)
	}
	return all
}

func (h *host) Expose(ctx context.Context, f gvproxy.Forward) (err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.forwards[f.Key]; ok {
		return usernet.ErrExists
	}
	e := exposed{Forward: f}
	switch f.Proto {
	case gvproxy.UDP:
		addr, err := net.ResolveUDPAddr("udp", f.Local)
		if err != nil {
			return err
		}
		if e.socket, err = net.ListenUDP("udp", addr); err != nil {
			return err
		}
	case gvproxy.NPipe:
		return errors.New("named pipes are not supported by this platform")
	default:
		if e.socket, err = new(net.ListenConfig).Listen(ctx, string(f.Proto), f.Local); err != nil {
			return err
		}
	}
	h.forwards[f.Key] = e
	return nil
}

func (h *host) Unexpose(_ context.Context, key gvproxy.Key, to netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	e, ok := h.forwards[key]
	if !ok || to.IsValid() && to != e.Target.Addr() {
		return usernet.ErrNotFound
	}
	delete(h.forwards, key)
	return e.socket.Close()
}

func (h *host) Zones() []gvproxy.Zone {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.zones
}

func (h *host) AddZone(z gvproxy.Zone) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.zones = gvproxy.Merge(h.zones, z)
	return nil
}

func (h *host) Leases() map[netip.Addr]gvproxy.MAC { return h.leases }
func (h *host) Stats() gvproxy.Stats               { return gvproxy.Stats{} }

func (h *host) CAM() map[gvproxy.MAC]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.cam)
}

func (h *host) DialGuest(context.Context, netip.AddrPort) (net.Conn, error) {
	return nil, errors.New("nobody is on the network")
}

// Attach learns the sender of the first frame and forgets it when the connection ends.
func (h *host) Attach(_ context.Context, conn net.Conn, early []byte) error {
	frame := make([]byte, 2+14)
	if _, err := io.ReadFull(conn, frame[copy(frame, early):]); err != nil {
		return err
	}
	if n := binary.LittleEndian.Uint16(frame); n != 14 {
		return errors.New("frame of an unexpected length")
	}
	vm := gvproxy.MAC(frame[2+6:][:6])
	h.mu.Lock()
	h.cam[vm] = len(h.cam)
	h.mu.Unlock()
	h.events.Send(gvproxy.ConnectionEstablished, vm)
	_, err := io.Copy(io.Discard, conn)
	h.mu.Lock()
	delete(h.cam, vm)
	h.mu.Unlock()
	h.events.Send(gvproxy.ConnectionClosed, vm)
	return err
}

// startOurs serves the API of what a command line asks for. It returns the API's socket and where its events come.
func startOurs(t *testing.T, args ...string) (api string, events *net.UnixListener, err error) {
	t.Helper()
	dir := t.TempDir()
	api = filepath.Join(dir, "api.sock")
	events = listen(t, filepath.Join(dir, "events.sock"))
	g, err := cli.ParseGvproxy(append([]string{"-notification", "unix://" + events.Addr().String()}, args...), os.ReadFile)
	if err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	h, err := newHost(ctx, g)
	if err != nil {
		cancel()
		return "", nil, err
	}
	l := listen(t, api)
	log := slog.New(slog.DiscardHandler)
	done := make(chan error, 2)
	go func() { done <- gvproxy.Serve(ctx, l, gvproxy.Full(h, log), log) }()
	go func() { done <- h.events.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, <-done, h.Close()); err != nil {
			t.Error(err)
		}
	})
	h.events.Send(gvproxy.Ready, gvproxy.MAC{})
	if _, err := event(events, patience); err != nil {
		t.Fatal(err)
	}
	return api, events, nil
}
