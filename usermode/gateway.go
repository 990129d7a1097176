// Package usermode is the gateway of a usermode network: it carries the containers' traffic between the network's own
// namespace, the fabric, and ordinary sockets of this process in the host's namespace, so that the host needs no
// route, no forwarding and no firewall rule. It does not make the containers' interfaces (package endpoint) and does
// not listen on the host (package portmap).
//
// In the fabric, the kernel is the containers' router. What leaves the network goes through a TUN device into a
// network stack in this process; what comes in through a published port is dialled from inside the fabric.
package usermode

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/undo"
)

// Config says what a network's gateway is.
type Config struct {
	ID       string // network ID; its first 12 characters name the pin
	Dir      string // directory in which fabrics are pinned, on a mount that outlives the process
	Bridge   string // name of the bridge in the fabric, which package endpoint makes
	Subnets  []usernet.Subnet
	MTU      int                   // bytes, at least 1280 unless Internal; 0 means 1500
	Internal bool                  // no way out of the network and none in
	Blocked  func(netip.Addr) bool // further addresses that containers must not reach; must not wait; may be nil
	Host     func() netip.Addr     // what HostAlias stands for; must not wait; nil: it is no address
	Log      *slog.Logger          // nil: nothing is logged

	FastPath  bool // splice TCP connections out of the network in the kernel, where it has what that needs
	NoOffload bool // keep segmentation and checksum offload of the TUN device off, though the kernel has it
}

// Gateway is one network's open fabric. Its methods may be called from several goroutines, Close last.
type Gateway struct {
	*fabric
	netns    *netns.NS // nil if the fabric is another process's
	sockets  *sockets
	netstack *netstack // nil on an internal network
	fast     *fastPath // nil: netstack carries TCP
}

// errInternal is what published ports of an internal network come to.
var errInternal = errors.New("the network is internal")

// Open enters the fabric of the network cfg.ID, making and pinning it first where it does not exist, and declares its
// state: system settings, the TUN device, routes and the rule for published ports. It may be called again after the
// process died at any instant; what containers have in the fabric stays. A fabric that it made goes again when the rest
// fails. Only one Gateway can hold a fabric at a time: the second gets EBUSY. The caller ends it with Close.
func Open(cfg Config) (g *Gateway, err error) {
	path, err := pinPath(cfg.Dir, cfg.ID)
	if err != nil {
		return nil, err
	}
	var unpin undo.List // only of what this call pinned
	ns, err := netns.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		ns, err = netns.Create(path)
		unpin.Push(func() error { return netns.Remove(path) })
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open fabric %s: %w", filepath.Base(path), err), unpin.Close())
		}
	}()
	if err != nil {
		return nil, err
	}
	var f *fabric
	err = ns.Do(func() (err error) {
		f, err = declare(cfg)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	f.undo.Push(ns.Close)
	g, err = newGateway(f, entered{ns})
	if err != nil {
		return nil, errors.Join(err, f.undo.Close())
	}
	g.netns = ns
	return g, nil
}

// newGateway makes the gateway of f, whose descriptors it owns unless it fails.
func newGateway(f *fabric, m socketMaker) (*Gateway, error) {
	g := &Gateway{fabric: f, sockets: &sockets{maker: m, spare: make(map[socketType][]int)}}
	f.undo.Push(g.sockets.close)
	if f.cfg.Internal {
		return g, nil
	}
	resolve := policy{own: g.prefixes(), blocked: f.cfg.Blocked, host: f.cfg.Host}.resolve
	if len(f.listeners) > 0 {
		g.fast = newFastPath(f, resolve)
	}
	var err error
	g.netstack, err = newNetstack(netstackConfig{
		MTU:     f.cfg.MTU,
		Offload: f.offload,
		Resolve: resolve,
		Sources: g.prefixes(),
		Fast:    g.fast,
		Log:     f.cfg.Log,
	})
	return g, err
}

// Run carries traffic between the fabric and the host until ctx is done, and then returns nil. It is called once.
// Packets that containers sent before are waiting in the TUN device. On an internal network there is nothing to carry.
func (g *Gateway) Run(ctx context.Context) error {
	if g.cfg.Internal {
		<-ctx.Done()
		return nil
	}
	if g.fast == nil {
		return g.netstack.run(ctx, g.tun)
	}
	defer g.fast.begin()()
	return g.netstack.run(ctx, g.tun)
}

// FastPath reports whether TCP connections out of the network are spliced in the kernel. If not, netstack carries them,
// and the error says why; it is nil when the fast path was not asked for.
func (g *Gateway) FastPath() (bool, error) { return g.fast != nil, g.fastErr }

// Repair sets again what the kernel may have reset in the fabric meanwhile.
func (g *Gateway) Repair() error {
	if g.netns == nil {
		return nil // the process inside sees to it
	}
	return g.netns.Do(g.repair)
}

// Netns is the fabric. It belongs to the Gateway and ends with Close.
func (g *Gateway) Netns() *netns.NS { return g.netns }

// Transparent reports whether containers see the real address of the clients of published ports. If not, they see
// the gateway's address, and the error says why.
func (g *Gateway) Transparent() (bool, error) {
	if g.cfg.Internal {
		return false, errInternal
	}
	return g.divertErr == nil, g.divertErr
}

// Close lets go of the fabric after Run has returned. The namespace, its bridge and the containers' interfaces stay;
// connections dialled in the fabric live on. Closing again is no error.
func (g *Gateway) Close() error { return g.undo.Close() }

// prefixes are the network's own addresses.
func (g *Gateway) prefixes() []netip.Prefix {
	var own []netip.Prefix
	for _, s := range g.cfg.Subnets {
		own = append(own, s.Prefix)
	}
	return own
}

// Remove takes away the pin in dir of the network id, which is gone. The fabric ends with the last descriptor of it.
// It succeeds when there is no pin.
func Remove(dir, id string) error {
	path, err := pinPath(dir, id)
	if err != nil {
		return err
	}
	return netns.Remove(path)
}

// Pinned lists the pins in dir, each the first 12 characters of a network ID, including those that a crash left half
// made; Remove takes either. A missing dir has none.
func Pinned(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list fabrics: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if !e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// An ID becomes a file name, below which things are unmounted: it must not lead anywhere else.
var validID = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z_-]*$`)

func pinPath(dir, id string) (string, error) {
	if !validID.MatchString(id) {
		return "", fmt.Errorf("network ID %q: %w", id, usernet.ErrInvalid)
	}
	return filepath.Join(dir, id[:min(len(id), 12)]), nil
}
