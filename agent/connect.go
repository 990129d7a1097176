package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

// patience is how long a gateway may take until frames follow.
const patience = 10 * time.Second

// connect reaches the gateway and agrees with it on a framing. takes is what the TAP finishes itself.
func (a *Agent) connect(ctx context.Context, takes l2.Offload) (*l2.Link, l2.Options, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if len(a.cfg.Command) > 0 {
		conn, err := start(a.cfg.Command)
		if err != nil {
			return nil, l2.Options{}, err
		}
		return l2.Stream(conn, l2.Options{}), l2.Options{}, nil
	}
	conn, err := vsock.Dial(ctx, a.cfg.Gateway)
	if err != nil {
		return nil, l2.Options{}, err
	}
	var opts l2.Options
	if a.cfg.Path != "" {
		if opts, err = negotiate(ctx, conn, a.cfg.Path, takes); err != nil {
			conn.Close()
			return nil, l2.Options{}, fmt.Errorf("%s: %w", a.cfg.Gateway, err)
		}
	}
	return l2.Stream(conn, opts), opts, nil
}

// negotiate gives up when ctx ends.
func negotiate(ctx context.Context, conn net.Conn, path string, takes l2.Offload) (l2.Options, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	opts, err := l2.Negotiate(conn, path, takes)
	if !stop() {
		return l2.Options{}, errors.Join(context.Cause(ctx), err)
	}
	return opts, err
}

// start runs a program whose stdin and stdout, one socket, are the connection. It is killed when the connection is closed, and
// what it says on stderr is said on ours.
func start(command []string) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "gateway"), os.NewFile(uintptr(fds[1]), "gateway")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, os.Stderr
	// Signals of the terminal are for the agent, which ends the program itself.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("start %s: %w", command[0], err)
	}
	return &program{conn.(*net.UnixConn), cmd}, nil
}

// program is a connection to a program that runs.
type program struct {
	*net.UnixConn
	cmd *exec.Cmd
}

// Close ends the program as well.
func (p *program) Close() error {
	err := p.UnixConn.Close()
	p.cmd.Process.Kill()
	p.cmd.Wait() // of one that was killed, an error
	return err
}
