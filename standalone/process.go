package standalone

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/rights"
)

// sockets are the resolver's, one pair at each gateway address.
type sockets struct {
	udp []net.PacketConn
	tcp []net.Listener
}

// innerProcess is the inner process as the outer one has it.
type innerProcess struct {
	cmd             *exec.Cmd
	fabric, control *net.UnixConn
	mu              sync.Mutex // over a question and its answer
}

// startInner starts an inner process and tells it what is wanted. wrap changes the command that is going to be started.
func startInner(cfg Config, r role, wrap func(*exec.Cmd) error) (_ *innerProcess, err error) {
	in := &innerProcess{}
	var ends [2]*os.File
	for i, conn := range []**net.UnixConn{&in.fabric, &in.control} {
		if *conn, ends[i], err = rights.Pair(); err != nil {
			return nil, errors.Join(err, in.close())
		}
		defer ends[i].Close()
	}
	in.cmd = exec.Command("/proc/self/exe", innerCommand)
	in.cmd.Stdin, in.cmd.Stdout, in.cmd.Stderr = cfg.Stdin, cfg.Stdout, cfg.Stderr
	in.cmd.ExtraFiles = ends[:] // descriptors 3 and 4
	in.cmd.SysProcAttr = namespaces()
	if wrap != nil {
		if err := wrap(in.cmd); err != nil {
			in.cmd = nil
			return nil, errors.Join(err, in.close())
		}
	}
	if err := in.cmd.Start(); err != nil {
		in.cmd = nil
		return nil, errors.Join(explainStart(err), in.close())
	}
	if err := rights.Send(in.control, cfg.order(r)); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", innerCommand, err), in.close())
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
	return fmt.Errorf("start %s: %w", innerCommand, err)
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
