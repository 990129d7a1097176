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
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/dns/resolvconf"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/rights"
	"github.com/usernet/usernet/usermode"
)

// order is what the inner process is told first.
type order struct {
	Role         role
	Command      []string // but for holders
	Network      usernet.Network
	Addr4, Addr6 netip.Addr
	Keep         bool
	UID, GID     int // the caller's
	LogLevel     slog.Level
}

// role is what an inner process does.
type role string

const (
	alone  role = "alone"  // has the fabric and the command
	holder role = "holder" // has the fabric, on which others' commands hang
	member role = "member" // has a command, on another process's fabric
)

func (c Config) order(r role) order {
	o := order{Role: r, Command: c.Command, Network: c.Network, Addr4: c.Addr4, Addr6: c.Addr6, Keep: c.Keep, UID: os.Geteuid(), GID: os.Getegid()}
	for o.LogLevel = slog.LevelDebug; o.LogLevel < slog.LevelError && !c.Log.Enabled(context.Background(), o.LogLevel); o.LogLevel += 4 {
	}
	return o
}

// note is what the outer process says afterwards.
type note struct {
	Start  bool // the command
	Signal int  // send it to the command

	Attach *attachment `json:",omitempty"` // a member's namespace, which comes along
}

// attachment is a command's place on the network.
type attachment struct {
	ID           string
	Addr4, Addr6 netip.Addr
}

// outcome is the inner process's last word.
type outcome struct {
	Status int    // of wait(2)
	Err    string `json:",omitempty"` // the command was not started, and why
	Errno  int    `json:",omitempty"`
}

// iface is the command's interface.
const iface = "eth0"

// inner is the inner process. It returns when the command has ended or the outer process has.
func inner() error {
	err := runInner()
	if errors.Is(err, io.EOF) || errors.Is(err, unix.EPIPE) {
		return nil // the outer process is gone, and nobody to tell
	}
	return err
}

func runInner() error {
	// Descriptors 3 and 4 are startInner's.
	fabric, err := inherited(3)
	if err != nil {
		return err
	}
	control, err := inherited(4)
	if err != nil {
		return err
	}
	// The terminal's signals are the command's. (Caught, not ignored: the command would inherit that.)
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP)
	var in innerSide
	if _, err := rights.Receive(control, &in.order); err != nil {
		return err
	}
	in.control = control
	if in.order.Role == member {
		return in.runMember()
	}
	in.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: in.order.LogLevel}))
	lending := make(chan error, 1)
	go func() { lending <- usermode.Lend(in.gateway(), fabric, in.prepare) }()
	o, err := in.serve()
	if err != nil {
		return err // what failed before the command is Lend's to tell
	}
	return rights.Send(control, o)
}

func inherited(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "inherited")
	defer f.Close()
	return rights.Conn(f)
}

// innerSide is the inner process's view of things.
type innerSide struct {
	order     order
	log       *slog.Logger
	control   *net.UnixConn
	segment   *endpoint.Segment
	container *netns.NS
}

// runMember makes the command's namespace, has it put on the fabric, and runs the command.
func (in *innerSide) runMember() (err error) {
	if in.container, err = netns.New(); err != nil {
		return errors.Join(err, rights.Send(in.control, outcome{Err: err.Error()}))
	}
	if err := rights.Send(in.control, outcome{}, in.container.Fd()); err != nil {
		return err
	}
	o, err := in.serve()
	if err != nil {
		return err
	}
	return rights.Send(in.control, o)
}

func (in *innerSide) gateway() usermode.Config {
	return Config{Network: in.order.Network, Log: in.log}.gateway()
}

// prepare puts the command's namespace on the fabric and passes the resolver's sockets on.
func (in *innerSide) prepare() (err error) {
	// Seen from here, in the fabric, the network is an ordinary bridge.
	n := in.order.Network
	n.Options.Mode, n.Options.BridgeName = usernet.Bridge, endpoint.FabricBridge
	if in.segment, err = endpoint.Open(endpoint.Config{Network: n, Log: in.log}); err != nil {
		return err
	}
	if in.order.Role == alone {
		if in.container, err = netns.New(); err != nil {
			return err
		}
		if err := in.attach(attachment{n.ID, in.order.Addr4, in.order.Addr6}, in.container); err != nil {
			return err
		}
	}
	return in.openResolver()
}

// attach puts a command's namespace on the fabric.
func (in *innerSide) attach(to attachment, ns *netns.NS) error {
	ep := usernet.Endpoint{ID: to.ID, NetworkID: in.order.Network.ID, IfName: iface}
	p := endpoint.Place{Netns: ns}
	for _, s := range in.order.Network.Subnets {
		a, own := to.Addr4, &ep.Addr4
		if s.Prefix.Addr().Is6() {
			a, own = to.Addr6, &ep.Addr6
		}
		if !a.IsValid() || !s.Prefix.Contains(a) {
			continue
		}
		*own = netip.PrefixFrom(a, s.Prefix.Bits())
		p.Addresses = append(p.Addresses, *own)
		if !in.order.Network.Internal {
			p.Gateways = append(p.Gateways, s.Gateway)
		}
	}
	ep.MAC = macFor(to)
	_, err := in.segment.Attach(ep, p)
	return err
}

// macFor is a locally administered address, made from the IP address.
func macFor(to attachment) net.HardwareAddr {
	ip := to.Addr6
	if to.Addr4.IsValid() {
		ip = to.Addr4
	}
	b := ip.AsSlice()
	return append(net.HardwareAddr{0x02, 0x42}, b[len(b)-4:]...)
}

// openResolver opens UDP and TCP sockets at the gateway's addresses.
func (in *innerSide) openResolver() error {
	var fds []int
	families := 0
	for _, s := range in.order.Network.Subnets {
		at := netip.AddrPortFrom(s.Gateway, 53).String()
		udp, err := net.ListenPacket("udp", at)
		if err != nil {
			return fmt.Errorf("open the resolver: %w", err)
		}
		defer udp.Close()
		tcp, err := net.Listen("tcp", at)
		if err != nil {
			return fmt.Errorf("open the resolver: %w", err)
		}
		defer tcp.Close()
		for _, c := range []syscall.Conn{udp.(*net.UDPConn), tcp.(*net.TCPListener)} {
			raw, err := c.SyscallConn()
			if err != nil {
				return err
			}
			raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
		}
		families++
	}
	return rights.Send(in.control, families, fds...)
}

// serve starts the command when it is told, passes signals to it, and kills it with the outer process.
func (in *innerSide) serve() (outcome, error) {
	notes := make(chan note)
	go func() {
		defer close(notes)
		for {
			var n note
			fds, err := rights.Receive(in.control, &n)
			if err != nil {
				if !errors.Is(err, io.EOF) {
					in.log.Error("the outer process is not heard", "error", err)
				}
				return
			}
			if n.Attach != nil && len(fds) == 1 {
				if rights.Send(in.control, in.attachPassed(*n.Attach, fds[0])) != nil {
					return
				}
				continue
			}
			notes <- n
		}
	}()
	for n := range notes {
		if n.Start {
			return in.runCommand(notes), nil
		}
	}
	return outcome{}, io.EOF
}

// attachPassed attaches the namespace that fd is of.
func (in *innerSide) attachPassed(to attachment, fd int) outcome {
	ns, err := netns.From(os.NewFile(uintptr(fd), "passed"))
	if err == nil {
		err = in.attach(to, ns)
		ns.Close()
	}
	if err != nil {
		return outcome{Err: err.Error()}
	}
	return outcome{}
}

func (in *innerSide) runCommand(notes <-chan note) outcome {
	if err := setResolvConf(in.order.Network); err != nil {
		in.log.Warn("the command resolves no names", "error", err)
	}
	cmd := exec.Command(in.order.Command[0], in.order.Command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if in.order.Keep && in.order.UID != 0 {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: in.order.UID, HostID: 0, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: in.order.GID, HostID: 0, Size: 1}}
	}
	runtime.LockOSThread() // the death signal comes with the end of the thread that started it
	defer runtime.UnlockOSThread()
	if err := in.container.Do(cmd.Start); err != nil {
		errno, _ := errors.AsType[syscall.Errno](err)
		if errors.Is(err, exec.ErrNotFound) {
			errno = unix.ENOENT
		}
		return outcome{Err: fmt.Sprintf("start %s: %v", in.order.Command[0], err), Errno: int(errno)}
	}
	ended := make(chan struct{})
	go func() {
		for {
			select {
			case n, ok := <-notes:
				if !ok {
					cmd.Process.Kill()
					return
				}
				if n.Signal != 0 {
					cmd.Process.Signal(syscall.Signal(n.Signal))
				}
			case <-ended:
				return
			}
		}
	}()
	cmd.Wait() // its result is in ProcessState
	close(ended)
	return outcome{Status: int(cmd.ProcessState.Sys().(syscall.WaitStatus))}
}

// setResolvConf has the command's resolv.conf(5) name the network's resolver, whatever the file is a link to. The
// caller is in a mount namespace of its own.
func setResolvConf(n usernet.Network) error {
	target, err := filepath.EvalSymlinks(resolvconf.Path)
	if err != nil {
		return err
	}
	old, err := os.ReadFile(target)
	if err != nil {
		return err
	}
	var b strings.Builder
	for _, s := range n.Subnets {
		fmt.Fprintln(&b, "nameserver", s.Gateway)
	}
	if search := resolvconf.Parse(old).Search; len(search) > 0 {
		fmt.Fprintln(&b, "search", strings.Join(search, " "))
	}
	// Mounts made here do not spread, and those of the host still arrive.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	f, err := os.CreateTemp("", "usernet-resolv-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // the mount keeps it
	defer f.Close()
	if _, err := f.WriteString(b.String()); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := unix.Mount(f.Name(), target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}
