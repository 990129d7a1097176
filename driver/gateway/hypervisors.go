package gateway

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

// handshakeTimeout is how long HyperKit may take to say who it is.
const handshakeTimeout = 10 * time.Second

// wire makes a link of a hypervisor's connection.
type wire func(ctx context.Context, conn net.Conn) (*l2.Link, error)

// hypervisors returns what listens for hypervisors. stop ends the gateway.
func (g *Gateway) hypervisors(stop func()) (open []func() (service, error)) {
	h := &g.cfg.Hypervisors
	stay := &linger{}
	once := &linger{after: h.Linger, end: func() {
		g.log.Info("the last machine has left")
		stop()
	}}
	for _, a := range h.VPNKit {
		open = append(open, func() (service, error) { return g.streams(a, "vpnkit", g.vpnkit, stay) })
	}
	for _, a := range h.QEMU {
		open = append(open, func() (service, error) { return g.streams(a, "qemu", g.qemu, once) })
	}
	for _, path := range h.Packets {
		open = append(open, func() (service, error) { return g.packets(path, once) })
	}
	for _, path := range h.Datagrams {
		open = append(open, func() (service, error) { return g.datagrams(path, once) })
	}
	if h.In != nil {
		open = append(open, func() (service, error) { return g.stdio(stop) })
	}
	return append(open, func() (service, error) { return once.service(), nil })
}

// service ends the waiting when the gateway ends.
func (l *linger) service() service {
	return service{
		run: func(ctx context.Context) error {
			<-ctx.Done()
			l.stop()
			return nil
		},
		close: func() error { return nil },
	}
}

// streams listens for hypervisors at a.
func (g *Gateway) streams(a vsock.Addr, name string, w wire, l *linger) (service, error) {
	listener, err := vsock.Listen(a)
	if err != nil {
		return service{}, err
	}
	return g.accepting(listener, name, w, l), nil
}

// packets listens for hypervisors whose packets are frames.
func (g *Gateway) packets(path string, l *linger) (service, error) {
	if err := free("unixpacket", path); err != nil {
		return service{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	listener, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return service{}, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return service{}, errors.Join(err, listener.Close())
	}
	return g.accepting(listener, "bess", g.bess, l), nil
}

func (g *Gateway) accepting(l net.Listener, name string, w wire, stay *linger) service {
	return service{
		run: func(ctx context.Context) error {
			return g.accept(ctx, l, name, func(ctx context.Context, c net.Conn) {
				stay.enter()
				defer stay.leave()
				g.attach(ctx, c, name, w)
			})
		},
		close: l.Close,
	}
}

// accept gives each connection that l accepts to serve, until ctx is done, closes l and waits for them.
func (g *Gateway) accept(ctx context.Context, l net.Listener, name string, serve func(context.Context, net.Conn)) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for wait := time.Duration(0); ; {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case err == nil:
			wait = 0
			serving.Go(func() { serve(ctx, conn) })
		case !temporary(err):
			g.events.Send(gvproxy.HypervisorError, gvproxy.MAC{})
			return fmt.Errorf("accept %s on %s: %w", name, l.Addr(), err)
		default: // too many descriptors, or a connection that has ended already
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			g.log.Warn("accept", "hypervisor", name, "err", err, "again", wait)
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
	}
}

// temporary tells whether it is worth the while to accept again. The method has no successor; net/http asks it, too.
func temporary(err error) bool {
	t, ok := errors.AsType[interface {
		error
		Temporary() bool
	}](err)
	return ok && t.Temporary()
}

// attach has a machine on the network as long as its connection stands.
func (g *Gateway) attach(ctx context.Context, conn net.Conn, name string, w wire) {
	link, err := w(ctx, conn)
	if err != nil {
		conn.Close()
		if ctx.Err() == nil {
			g.log.Warn("connection is of no use", "hypervisor", name, "err", err)
		}
		return
	}
	if err := g.machines.carry(ctx, link, name); err != nil {
		g.log.Warn("connection failed", "hypervisor", name, "err", err)
	}
}

func (g *Gateway) options(f l2.Framing) l2.Options {
	return l2.Options{Framing: f, MTU: g.cfg.Network.MTU}
}

func (g *Gateway) qemu(_ context.Context, conn net.Conn) (*l2.Link, error) {
	return l2.Stream(conn, g.options(l2.QEMU)), nil
}

func (g *Gateway) bess(_ context.Context, conn net.Conn) (*l2.Link, error) {
	return l2.Packets(conn.(*net.UnixConn), g.options(l2.Bare))
}

func (g *Gateway) vpnkit(ctx context.Context, conn net.Conn) (*l2.Link, error) {
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := l2.HandshakeVPNKit(conn, g.cfg.Network.MTU, func(uuid string) (l2.MAC, error) {
		return g.vpnkitMAC(uuid), nil
	})
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	return l2.Stream(conn, g.options(l2.HyperKit)), nil
}

// vpnkitMAC is the address for a machine: the one that it was given, or always the same one of the locally administered ones.
func (g *Gateway) vpnkitMAC(uuid string) l2.MAC {
	uuid = strings.ToLower(uuid)
	if mac, ok := g.cfg.Hypervisors.VPNKitMACs[uuid]; ok {
		return mac
	}
	sum := sha256.Sum256([]byte(uuid))
	return l2.MAC{0x5a, 0x94, 0xef, sum[0], sum[1], sum[2]}
}

// datagrams binds a socket that a hypervisor sends frames to.
func (g *Gateway) datagrams(path string, l *linger) (service, error) {
	if err := free("unixgram", path); err != nil {
		return service{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return service{}, err
	}
	err = os.Chmod(path, 0o600)
	ours, statErr := os.Lstat(path)
	if err := errors.Join(err, statErr); err != nil {
		return service{}, errors.Join(err, conn.Close(), os.Remove(path))
	}
	remove := func() error {
		// Somebody may have put another one in its place, as podman machine does for the next gvproxy.
		if now, err := os.Lstat(path); err == nil && os.SameFile(ours, now) {
			return os.Remove(path)
		}
		return nil
	}
	end := func() error { return errors.Join(conn.Close(), remove()) }
	return service{
		run: func(ctx context.Context) error {
			return errors.Join(g.receive(ctx, conn, l), end())
		},
		close: end,
	}, nil
}

// receive serves one machine after the other on a socket of datagrams until ctx is done.
func (g *Gateway) receive(ctx context.Context, conn *net.UnixConn, l *linger) error {
	for {
		link, err := l2.AwaitPeer(ctx, conn, g.options(l2.Bare))
		if ctx.Err() != nil {
			if err == nil {
				link.Close()
			}
			return nil
		}
		if err != nil {
			g.events.Send(gvproxy.HypervisorError, gvproxy.MAC{})
			return err
		}
		l.enter()
		err = g.machines.carry(ctx, link, "vfkit")
		l.leave()
		if err != nil {
			g.log.Debug("datagrams have ended", "err", err)
		}
	}
}

// stdio has the machine on the wire of the configuration on the network. When it leaves, the gateway ends: nobody else can come.
func (g *Gateway) stdio(stop func()) (service, error) {
	link, err := l2.Stdio(g.cfg.Hypervisors.In, g.cfg.Hypervisors.Out, g.options(l2.HyperKit))
	if err != nil {
		return service{}, err
	}
	return service{
		run: func(ctx context.Context) error {
			defer stop()
			return g.machines.carry(ctx, link, "stdio")
		},
		close: link.Close,
	}, nil
}

// free removes a socket that nobody answers on any more.
func free(network, path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return errors.New("it is there and is no socket")
	}
	conn, err := net.DialUnix(network, nil, &net.UnixAddr{Name: path, Net: network})
	switch {
	case err == nil:
		conn.Close()
		return vsock.ErrInUse
	case refused(err):
		return os.Remove(path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("%w: %w", vsock.ErrInUse, err)
}
