package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/usernet/usernet/internal/netns"
)

// daemon is a process in the pretend host. Its log is NAME.log in the engine's directory.
type daemon struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it ended
}

// daemon starts a command that Command prepared.
func (b *rig) daemon(name string, cmd *exec.Cmd) (*daemon, error) {
	d := &daemon{name: name, log: b.Log(name), cmd: cmd, done: make(chan struct{})}
	f, err := os.Create(d.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	if err := b.Start(cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		cmd.Wait()
		close(d.done)
	}()
	return d, nil
}

func (d *daemon) ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// stop ends the daemon and everything that it started.
func (d *daemon) stop() {
	for _, p := range processes(d.cmd.Process.Pid) {
		syscall.Kill(p.pid, syscall.SIGKILL)
	}
	<-d.done
}

// logs returns the ends of the daemons' logs, for messages.
func logs(daemons []*daemon) (text string) {
	for _, d := range daemons {
		if b, err := os.ReadFile(d.log); err == nil && len(b) > 0 {
			text += fmt.Sprintf("; %s: %s", d.name, b[max(0, len(b)-200):])
		}
	}
	return text
}

// namespaceOf is the network namespace of a daemon.
func namespaceOf(d *daemon) (*netns.NS, error) {
	return netns.Open(fmt.Sprintf("/proc/%d/ns/net", d.cmd.Process.Pid))
}
