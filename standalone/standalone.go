// Package standalone runs a command on a usermode network of its own, without an engine and, where the kernel lets
// ordinary users have user namespaces, without root.
//
// It takes two processes. The outer one is the one that was called: it has the gateway, the published ports and the
// resolver, all with ordinary sockets of the host. The inner one is started in a user, a network and a mount namespace
// of its own; it makes the fabric there, lends it (usermode.Lend), and starts the command in another network namespace
// that hangs on the fabric as a container does. When either ends, by whatever cause, so do the other and the command,
// and the kernel takes away what they had.
package standalone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/dns/resolvconf"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/rights"
	"github.com/usernet/usernet/portmap"
	"github.com/usernet/usernet/usermode"
)

// InnerCommand is the argument that makes the program the inner process: main calls Inner.
const InnerCommand = "standalone-inner"

// Config says what to run and on which network.
type Config struct {
	Command  []string
	Network  usernet.Network // of mode Usermode, complete: with subnets and their gateways
	Addr4    netip.Addr      // the command's
	Addr6    netip.Addr      // zero: no IPv6
	Ports    []usernet.Port
	Servers  []netip.AddrPort // upstream resolvers; none: the host's
	NoEgress bool             // the command reaches nothing outside; published ports work
	Keep     bool             // the command has the caller's user ID instead of root's
	Log      *slog.Logger

	Stdin          *os.File
	Stdout, Stderr *os.File
}

// Run runs the command until it ends, and returns how it ended. Signals that the process gets go to the command.
//
// An error is one of ours: the command was not started, or what had to be cleaned up is left.
func Run(cfg Config) (status syscall.WaitStatus, err error) {
	in, err := startInner(cfg)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, in.close()) }()
	gateway, err := usermode.Borrow(cfg.gateway(), in.fabric)
	if err != nil {
		return 0, err
	}
	defer gateway.Close()
	resolver, err := in.resolverSockets()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	defer serving.Wait()
	defer cancel()
	serving.Go(func() {
		if err := gateway.Run(ctx); err != nil {
			cfg.Log.Error("the network has stopped", "error", err)
		}
	})
	serveNames(ctx, &serving, cfg, resolver)

	mapper := portmap.New(cfg.Log)
	for _, p := range cfg.Ports {
		f, err := mapper.Publish(portmap.Request{
			Owner: "usernet run", Port: p, Addr4: cfg.Addr4, Addr6: cfg.Addr6, Dialer: gateway,
		})
		if err != nil {
			return 0, err
		}
		defer f.Close()
		if p.HostPort == 0 || p.HostPortEnd > p.HostPort {
			cfg.Log.Info("published", "port", f.Port().String())
		}
	}
	defer in.passSignals()()
	return in.wait()
}

// gateway is the network's gateway as both processes see it.
func (c Config) gateway() usermode.Config {
	g := usermode.Config{
		ID:       c.Network.ID,
		Bridge:   endpoint.FabricBridge,
		Subnets:  c.Network.Subnets,
		MTU:      c.Network.MTU(),
		Internal: c.Network.Internal,
		FastPath: c.Network.Options.FastPath,
		Log:      c.Log,
	}
	if c.NoEgress {
		g.Blocked = func(netip.Addr) bool { return true }
	}
	return g
}

// serveNames answers the command's questions, at the gateway's addresses.
func serveNames(ctx context.Context, serving *sync.WaitGroup, cfg Config, s sockets) {
	var gateways []netip.Addr
	for _, n := range cfg.Network.Subnets {
		gateways = append(gateways, n.Gateway)
	}
	var subnets []netip.Prefix
	for _, n := range cfg.Network.Subnets {
		subnets = append(subnets, n.Prefix)
	}
	c := dns.Config{
		Sources: []dns.Source{dns.NewRecords(dns.Network{Subnets: subnets, Gateway: gateways})},
		Log:     cfg.Log,
	}
	switch {
	case cfg.NoEgress || cfg.Network.Internal:
	case len(cfg.Servers) > 0:
		c.Servers = func() []netip.AddrPort { return cfg.Servers }
	default:
		follower := resolvconf.NewFollower(resolvconf.Path, cfg.Log)
		serving.Go(func() { follower.Run(ctx) })
		c.Servers = follower.Servers
	}
	resolver := dns.New(c)
	for i := range s.udp {
		serving.Go(func() {
			if err := resolver.Serve(ctx, s.udp[i], s.tcp[i]); err != nil {
				cfg.Log.Error("the resolver has stopped", "error", err)
			}
		})
	}
}

// sockets are the resolver's, one pair at each gateway address.
type sockets struct {
	udp []net.PacketConn
	tcp []net.Listener
}

// innerProcess is the inner process as the outer one has it.
type innerProcess struct {
	cmd             *exec.Cmd
	fabric, control *net.UnixConn
}

// startInner starts the inner process and tells it what is wanted.
func startInner(cfg Config) (_ *innerProcess, err error) {
	in := &innerProcess{}
	var ends [2]*os.File
	for i, conn := range []**net.UnixConn{&in.fabric, &in.control} {
		if *conn, ends[i], err = rights.Pair(); err != nil {
			return nil, errors.Join(err, in.close())
		}
		defer ends[i].Close()
	}
	in.cmd = exec.Command("/proc/self/exe", InnerCommand)
	in.cmd.Stdin, in.cmd.Stdout, in.cmd.Stderr = cfg.Stdin, cfg.Stdout, cfg.Stderr
	in.cmd.ExtraFiles = ends[:] // descriptors 3 and 4
	in.cmd.SysProcAttr = namespaces()
	if err := in.cmd.Start(); err != nil {
		in.cmd = nil
		return nil, errors.Join(explainStart(err), in.close())
	}
	if err := rights.Send(in.control, cfg.order()); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", InnerCommand, err), in.close())
	}
	return in, nil
}

// namespaces are those of the inner process. Root needs no user namespace, in which it would be less than it is.
func namespaces() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	if os.Geteuid() == 0 {
		return a
	}
	a.Cloneflags |= unix.CLONE_NEWUSER
	a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
	a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	return a
}

func explainStart(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("make namespaces: %w (usernet doctor tells why the kernel refuses them)", err)
	}
	return fmt.Errorf("start %s: %w", InnerCommand, err)
}

// resolverSockets takes what the inner process has opened.
func (in *innerProcess) resolverSockets() (s sockets, err error) {
	var families int
	fds, err := rights.Receive(in.control, &families)
	if err != nil {
		return s, err
	}
	if len(fds) != 2*families {
		err = fmt.Errorf("%d resolver sockets came, want %d", len(fds), 2*families)
	}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "resolver")
		switch {
		case err != nil:
		case i%2 == 0:
			var c net.PacketConn
			c, err = net.FilePacketConn(f)
			s.udp = append(s.udp, c)
		default:
			var l net.Listener
			l, err = net.FileListener(f)
			s.tcp = append(s.tcp, l)
		}
		f.Close()
	}
	return s, err
}

// wait has the command started and returns how it ended.
func (in *innerProcess) wait() (syscall.WaitStatus, error) {
	if err := rights.Send(in.control, note{Start: true}); err != nil {
		return 0, err
	}
	var o outcome
	if _, err := rights.Receive(in.control, &o); errors.Is(err, io.EOF) {
		return 0, errors.New("the inner process was killed")
	} else if err != nil {
		return 0, err
	}
	if o.Err != "" {
		return 0, &StartError{o.Err, syscall.Errno(o.Errno)}
	}
	return syscall.WaitStatus(o.Status), nil
}

// StartError says that the command could not be started.
type StartError struct {
	text  string
	Errno syscall.Errno // ENOENT: there is no such command
}

func (e *StartError) Error() string { return e.text }

// passSignals gives the command the signals that come, until the function it returns is called. What the terminal
// sends, it sends to the command as well.
func (in *innerProcess) passSignals() (stop func()) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2)
	_, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS)
	terminal := err == nil
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range signals {
			if terminal && (s == unix.SIGINT || s == unix.SIGQUIT) {
				continue
			}
			rights.Send(in.control, note{Signal: int(s.(syscall.Signal))})
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
		<-done
	}
}

// close ends the inner process and whatever it started, and waits for it.
func (in *innerProcess) close() error {
	for _, c := range []*net.UnixConn{in.control, in.fabric} {
		if c != nil {
			c.Close()
		}
	}
	if in.cmd == nil {
		return nil
	}
	in.cmd.Process.Kill()
	in.cmd.Wait() // killed, or with the status of its own end: of no interest
	return nil
}
