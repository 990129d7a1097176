package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// trial is what came of one process that makes the experiments.
type trial struct {
	once[trialResult]
}

type trialResult struct {
	results results
	err     error // the process could not be started, or did not get to its end
}

// asUser is the trial with the rights that the kernel gives everybody: in a user namespace.
func (m *machine) asUser(ctx context.Context) trialResult {
	return m.user.get(func() trialResult { return m.try(ctx, syscall.CLONE_NEWUSER) })
}

// ownRights is the trial with the rights that usernet will have when this user starts it.
func (m *machine) ownRights(ctx context.Context) trialResult {
	if m.uid != 0 {
		return m.asUser(ctx)
	}
	return m.privileged.get(func() trialResult { return m.try(ctx, 0) })
}

// try runs Probe in new network and mount namespaces, and what else the flags of clone(2) say.
func (m *machine) try(ctx context.Context, flags uintptr) trialResult {
	if len(m.cfg.Probe) == 0 {
		return trialResult{err: errors.New("there is no command for experiments")}
	}
	outer, err := namespaces()
	if err != nil {
		return trialResult{err: err}
	}
	cmd := exec.CommandContext(ctx, m.cfg.Probe[0], append(m.cfg.Probe[1:len(m.cfg.Probe):len(m.cfg.Probe)], outer...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second
	// The administrators' programs are not in every user's path.
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH="+os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | flags, Pdeathsig: syscall.SIGKILL,
	}
	if flags&syscall.CLONE_NEWUSER != 0 {
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: m.uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: m.gid, Size: 1}}
	}
	runtime.LockOSThread() // Pdeathsig is the thread's
	defer runtime.UnlockOSThread()
	err = cmd.Run()
	if ctx.Err() != nil {
		return trialResult{err: fmt.Errorf("the experiments did not end within %v", m.patience)}
	}
	if err != nil {
		if text := strings.TrimSpace(stderr.String()); text != "" {
			err = fmt.Errorf("%w: %s", err, firstLine(text))
		}
		return trialResult{err: err}
	}
	var rs results
	if err := json.Unmarshal(stdout.Bytes(), &rs); err != nil {
		return trialResult{err: fmt.Errorf("read the results of the experiments: %w", err)}
	}
	return trialResult{results: rs}
}

// failed tells whether the experiment was made and how it failed; "" is well.
func (t trialResult) failed(name string) (why string, tried bool) {
	if t.err != nil {
		return "", false
	}
	r, tried := t.results[name]
	return r.Err, tried
}

// refused tells whether namespaces could not be made, or not be used, and by which error.
func (t trialResult) refused() (syscall.Errno, bool) {
	var errno syscall.Errno
	if errors.As(t.err, &errno) {
		return errno, true
	}
	if r := t.results[tryLinks]; r.Err != "" {
		if r.Errno == 0 {
			r.Errno = unix.EPERM
		}
		return r.Errno, true
	}
	return 0, false
}
