package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Daemon is a daemon that may have to be started first: what doors need that are a process for each call.
type Daemon struct {
	Socket string // its control socket
	// Serve is the command line of a daemon that listens on Socket, to be started when there is none; empty: from here
	// none can be.
	Serve  []string
	Advice string // what people can do about that
}

// Ask makes a call of the daemon, and starts one when there is none, or none any more.
func (d Daemon) Ask(ctx context.Context, call func(*Client) error) error {
	for try := 1; ; try++ {
		err := call((&Client{path: d.Socket, userns: userNamespace()}).passing(nil))
		leaving, left := errors.AsType[*leavingError](err)
		switch {
		case try == 3:
			return err
		case left:
			err = leaving.wait(ctx)
		case errors.Is(err, ErrAbsent):
			if err = d.start(ctx); err != nil {
				err = unstartable{fmt.Errorf("start the usernet daemon: %w", err)}
			}
		default:
			return err
		}
		if err != nil {
			return err
		}
	}
}

// startTimeout bounds how long a new daemon may take until it listens; it then has no network yet to bring back that
// could take long.
const startTimeout = 20 * time.Second

// start starts a daemon that outlives this process, the engine and the unit they run in, and returns when it listens. Of
// several that want one at the same time, one starts it and the others wait.
//
// It is for machines without systemd, and for those whose administrator did not enable usernet's sockets: where they are,
// there is always somebody who answers.
func (d Daemon) start(ctx context.Context) error {
	if len(d.Serve) == 0 {
		return fmt.Errorf("none listens on %s, and from here none can be started: %s", d.Socket, cmp.Or(d.Advice, "do that outside of the engine"))
	}
	dir := filepath.Dir(d.Socket)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "start.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := flock(lock); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if c, err := net.Dial("unix", d.Socket); err == nil {
		return c.Close() // somebody was faster
	}
	return d.spawn(ctx, dir)
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// spawn starts the daemon and waits until it says that it is ready, as it would say to systemd (sd_notify(3)).
func (d Daemon) spawn(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	path := filepath.Join(dir, fmt.Sprintf("start-%d.sock", os.Getpid()))
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer os.Remove(path)
	defer ready.Close()
	log, err := os.OpenFile(filepath.Join(dir, "usernet.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(d.Serve[0], d.Serve[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(environment(), "NOTIFY_SOCKET="+path)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	unix.Umask(0o022)
	if err := cmd.Start(); err != nil {
		return err
	}
	leaveCgroup(cmd.Process.Pid)
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		ready.SetReadDeadline(time.Unix(1, 0))
	}()
	defer context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Unix(1, 0)) })()
	b := make([]byte, 4096)
	for {
		n, err := ready.Read(b)
		if err == nil && strings.Contains("\n"+string(b[:n]), "\nREADY=1") {
			return nil
		}
		if err == nil {
			continue
		}
		select {
		case err := <-ended:
			return fmt.Errorf("%s: %w; %s says why", strings.Join(d.Serve, " "), err, log.Name())
		default:
			return errors.Join(fmt.Errorf("%s: not ready after %v; %s may say why", strings.Join(d.Serve, " "), startTimeout, log.Name()), cmd.Process.Kill())
		}
	}
}

// environment is what a daemon needs of ours.
func environment() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, name := range []string{
		"HOME", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME",
		// Podman's, in the user namespace of an ordinary user.
		"_CONTAINERS_USERNS_CONFIGURED", "_CONTAINERS_ROOTLESS_UID", "_CONTAINERS_ROOTLESS_GID",
	} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// leaveCgroup moves a process out of the control group of whoever started the engine, with which a service manager would
// kill it, as far as we may.
func leaveCgroup(pid int) {
	// Version 2 is mounted on the directory itself, the hierarchies of version 1 below it.
	groups, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		return
	}
	const top = "/sys/fs/cgroup/cgroup.procs"
	if _, err := os.Stat(top); err == nil {
		groups = []string{top}
	}
	for _, g := range groups {
		os.WriteFile(g, []byte(strconv.Itoa(pid)), 0) // an ordinary user may not
	}
}
