package standalone

import (
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
	Command      []string
	Network      usernet.Network
	Addr4, Addr6 netip.Addr
	Keep         bool
	UID, GID     int // the caller's
	LogLevel     slog.Level
}

func (c Config) order() order {
	o := order{Command: c.Command, Network: c.Network, Addr4: c.Addr4, Addr6: c.Addr6, Keep: c.Keep, UID: os.Geteuid(), GID: os.Getegid()}
	for o.LogLevel = slog.LevelDebug; o.LogLevel < slog.LevelError && !c.Log.Enabled(nil, o.LogLevel); o.LogLevel += 4 {
	}
	return o
}

// note is what the outer process says afterwards.
type note struct {
	Start  bool // the command
	Signal int  // send it to the command
}

// outcome is the inner process's last word.
type outcome struct {
	Status int    // of wait(2)
	Err    string `json:",omitempty"` // the command was not started, and why
	Errno  int    `json:",omitempty"`
}

// iface is the command's interface.
const iface = "eth0"

// Inner is the inner process. It returns when the command has ended or the outer process has.
func Inner() error {
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
	var in inner
	if _, err := rights.Receive(control, &in.order); err != nil {
		return err
	}
	in.control = control
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

type inner struct {
	order     order
	log       *slog.Logger
	control   *net.UnixConn
	container *netns.NS
}

func (in *inner) gateway() usermode.Config {
	return Config{Network: in.order.Network, Log: in.log}.gateway()
}

// prepare puts the command's namespace on the fabric and passes the resolver's sockets on.
func (in *inner) prepare() (err error) {
	if in.container, err = netns.New(); err != nil {
		return err
	}
	// Seen from here, in the fabric, the network is an ordinary bridge.
	n := in.order.Network
	n.Options.Mode, n.Options.BridgeName = usernet.Bridge, endpoint.FabricBridge
	segment, err := endpoint.Open(endpoint.Config{Network: n, Log: in.log})
	if err != nil {
		return err
	}
	ep, place := in.endpoint()
	if _, err := segment.Attach(ep, place); err != nil {
		return err
	}
	return in.openResolver()
}

// endpoint is the command's place on the network.
func (in *inner) endpoint() (usernet.Endpoint, endpoint.Place) {
	ep := usernet.Endpoint{ID: in.order.Network.ID, NetworkID: in.order.Network.ID, IfName: iface}
	ep.MAC = macFor(in.order.Addr4)
	p := endpoint.Place{Netns: in.container}
	for _, s := range in.order.Network.Subnets {
		a, own := in.order.Addr4, &ep.Addr4
		if s.Prefix.Addr().Is6() {
			a, own = in.order.Addr6, &ep.Addr6
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
	return ep, p
}

// macFor is a locally administered address, made from the IP address.
func macFor(a netip.Addr) net.HardwareAddr {
	ip := a.As4()
	return net.HardwareAddr{0x02, 0x42, ip[0], ip[1], ip[2], ip[3]}
}

// openResolver opens UDP and TCP sockets at the gateway's addresses.
func (in *inner) openResolver() error {
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
func (in *inner) serve() (outcome, error) {
	notes := make(chan note)
	go func() {
		defer close(notes)
		for {
			var n note
			if _, err := rights.Receive(in.control, &n); err != nil {
				if !errors.Is(err, io.EOF) {
					in.log.Error("the outer process is not heard", "error", err)
				}
				return
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

func (in *inner) runCommand(notes <-chan note) outcome {
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
