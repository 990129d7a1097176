package engine

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// StartUsernet starts usernet serve with args beyond the usual ones and waits until engines could reach it.
func (h *Host) StartUsernet(ctx context.Context, args ...string) error {
	usual := []string{
		"--plugin-socket", PluginSocket,
		"--control-socket", ControlSocket,
		"--state-dir", filepath.Join(h.Dir, "state"),
		"--run-dir", RunDir,
	}
	sockets := []string{PluginSocket, ControlSocket}
	if h.user != nil {
		usual, sockets = nil, []string{filepath.Join(h.UsernetDir(), "usernet.sock")}
	}
	usual = append(append([]string{"serve", "--log-level", "debug"}, usual...), args...)
	p, err := h.spawnCommand(h.user.become(h.Command(context.Background(), filepath.Join(h.Dir, "bin/usernet"), usual...)))
	if err != nil {
		return err
	}
	h.usernet = p
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return p.ready(ctx, func(ctx context.Context) error {
		for _, socket := range sockets {
			c, err := h.DialUnix(socket)(ctx, "", "")
			if err != nil {
				return err
			}
			c.Close()
		}
		return nil
	})
}

// ActivateUsernet listens in the user's daemon's place, as systemd would, and starts it when somebody calls; then, or when
// ctx ends before that, it tells how that went.
func (h *Host) ActivateUsernet(ctx context.Context) (<-chan error, error) {
	path := filepath.Join(h.UsernetDir(), "usernet.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.Path(path), Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chown(h.Path(path), h.user.id, h.user.id); err != nil {
		return nil, err
	}
	f, err := l.File()
	if err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() {
		defer f.Close()
		done <- func() error {
			for ctx.Err() == nil {
				n, err := unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}, 100)
				if err != nil && !errors.Is(err, unix.EINTR) {
					return err
				}
				if n > 0 {
					return h.startActivated(f)
				}
			}
			return ctx.Err()
		}()
	}()
	return done, nil
}

// startActivated starts usernet with a socket as sd_listen_fds(3) describes it.
func (h *Host) startActivated(socket *os.File) error {
	const script = `LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=control exec "$0" serve --log-level debug`
	cmd := h.user.become(h.Command(context.Background(), "sh", "-c", script, filepath.Join(h.Dir, "bin/usernet")))
	cmd.ExtraFiles = []*os.File{socket}
	cmd.Args[0] = "usernet" // the name of the log
	p, err := h.spawnCommand(cmd)
	if err == nil {
		h.usernet = p
	}
	return err
}

// StopUsernet stops usernet as a service manager does.
func (h *Host) StopUsernet() error { return h.usernet.stop(syscall.SIGTERM) }

// KillUsernet ends usernet with SIGKILL.
func (h *Host) KillUsernet() error { return h.usernet.stop(syscall.SIGKILL) }

// SignalUsernet sends usernet a signal.
func (h *Host) SignalUsernet(sig syscall.Signal) error { return h.usernet.cmd.Process.Signal(sig) }

// UsernetRunning says whether the process that StartUsernet started is alive.
func (h *Host) UsernetRunning() bool { return h.usernet != nil && !h.usernet.ended() }
