package engine

import (
	"context"
	"path/filepath"
	"syscall"
)

// StartUsernet starts usernet serve with args beyond the usual ones and waits until Docker could reach it.
func (h *Host) StartUsernet(ctx context.Context, args ...string) error {
	usual := []string{
		"serve",
		"--plugin-socket", PluginSocket,
		"--control-socket", ControlSocket,
		"--state-dir", filepath.Join(h.Dir, "state"),
		"--run-dir", RunDir,
		"--log-level", "debug",
	}
	p, err := h.spawn(filepath.Join(h.Dir, "bin/usernet"), append(usual, args...)...)
	if err != nil {
		return err
	}
	h.usernet = p
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return p.ready(ctx, func(ctx context.Context) error {
		for _, socket := range []string{PluginSocket, ControlSocket} {
			c, err := h.DialUnix(socket)(ctx, "", "")
			if err != nil {
				return err
			}
			c.Close()
		}
		return nil
	})
}

// StopUsernet stops usernet as a service manager does.
func (h *Host) StopUsernet() error { return h.usernet.stop(syscall.SIGTERM) }

// KillUsernet ends usernet with SIGKILL.
func (h *Host) KillUsernet() error { return h.usernet.stop(syscall.SIGKILL) }

// SignalUsernet sends usernet a signal.
func (h *Host) SignalUsernet(sig syscall.Signal) error { return h.usernet.cmd.Process.Signal(sig) }

// UsernetRunning says whether the process that StartUsernet started is alive.
func (h *Host) UsernetRunning() bool { return h.usernet != nil && !h.usernet.ended() }
