package engine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// process is a daemon in the pretend host. Its output goes to a log file.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it ended
}

// spawn starts a daemon. Its log is NAME.log in the engine's directory; a restart appends.
func (h *Host) spawn(name string, args ...string) (*process, error) {
	return h.spawnCommand(h.Command(context.Background(), name, args...))
}

func (h *Host) spawnCommand(cmd *exec.Cmd) (*process, error) {
	p := &process{name: filepath.Base(cmd.Args[0]), cmd: cmd, done: make(chan struct{})}
	p.log = h.Log(p.name)
	f, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := h.Start(p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() {
		p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Log is the path of a daemon's log file: "dockerd" or "usernet".
func (h *Host) Log(name string) string { return filepath.Join(h.Dir, name+".log") }

// ready waits until probe succeeds, the process ends or ctx does.
func (p *process) ready(ctx context.Context, probe func(context.Context) error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s: %s:\n%s", p.name, p.cmd.ProcessState, tail(p.log, 4000))
		case <-ctx.Done():
			return fmt.Errorf("%s: not ready in time: %w:\n%s", p.name, err, tail(p.log, 4000))
		case <-tick.C:
		}
	}
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop sends sig and waits for the end. A process that ended already is fine.
func (p *process) stop(sig syscall.Signal) error {
	if p == nil || p.ended() {
		return nil
	}
	p.cmd.Process.Signal(sig)
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-p.done:
		return nil
	case <-timeout.C:
		p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("%s: did not stop within %v:\n%s", p.name, startTimeout, tail(p.log, 4000))
	}
}

// kill is stop with SIGTERM.
func (p *process) kill() error { return p.stop(syscall.SIGTERM) }

// tail returns the last n bytes of a file, for messages.
func tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err.Error()
	}
	b := make([]byte, min(size, n))
	if _, err := f.ReadAt(b, size-int64(len(b))); err != nil {
		return err.Error()
	}
	return string(b)
}

// LogSizes tells how long the daemons' logs are now, for LogsSince.
func (h *Host) LogSizes() map[string]int64 {
	sizes := map[string]int64{}
	for _, name := range []string{"dockerd", "usernet"} {
		if fi, err := os.Stat(h.Log(name)); err == nil {
			sizes[name] = fi.Size()
		}
	}
	return sizes
}

// LogsSince returns what the daemons logged after sizes was taken; of much, the end, and of Docker only what is not
// merely informative.
func (h *Host) LogsSince(sizes map[string]int64) string {
	var b strings.Builder
	for _, name := range []string{"dockerd", "usernet"} {
		if fi, err := os.Stat(h.Log(name)); err == nil {
			fmt.Fprintf(&b, "%s.log:\n", name)
			for line := range strings.Lines(tail(h.Log(name), min(fi.Size()-sizes[name], 32<<10))) {
				if name != "dockerd" || !strings.Contains(line, "level=info") {
					b.WriteString(line)
				}
			}
		}
	}
	return b.String()
}
