package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Machines is a pretend host for virtual machines. It has QEMU, vhost-device-vsock, usernet, the probe and a real gvproxy, and an
// ordinary user, whom all of it runs as. In its directory
// are the programs, in bin, and the test image, image.tar.
type Machines struct {
	*Host
	Own string // a directory of the user's, with the same path in and outside the pretend host
}

// machineUser is nobody's number on the host.
const machineUser = 4321

// WithMachines runs a test on a new host of that kind, as Each does.
func WithMachines(t *testing.T, run func(t *testing.T, m *Machines)) {
	root := filepath.Join(cacheDir(), "sid")
	if err := missingMachines(root); err != nil {
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	host, err := newHost(root)
	if err != nil {
		t.Fatal(err)
	}
	defer host.end(t)
	m := &Machines{Host: host, Own: filepath.Join(host.Dir, "user")}
	if err := m.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, m)
}

func missingMachines(root string) error {
	for _, f := range []string{
		filepath.Join(root, "usr/bin/qemu-system-x86_64"), filepath.Join(root, "usr/bin/vhost-device-vsock"),
		MachineFile("disk.ext4"), Peer("gvproxy"), Peer("gvforwarder"),
	} {
		if _, err := os.Stat(f); err != nil {
			return fmt.Errorf("virtual machines (test/setup.sh installs them): %w", err)
		}
	}
	if os.Geteuid() != 0 {
		return errors.New("virtual machines: needs root")
	}
	return nil
}

// MachineFile is the path of what machines boot: vmlinuz, disk.ext4, and modules, a directory with a file list.
func MachineFile(name string) string { return filepath.Join(cacheDir(), "vm1", name) }

// Peer is the path of another project's program that test/setup.sh built.
func Peer(name string) string { return filepath.Join(cacheDir(), "peers", name) }

// RealGvproxy and Gvproxy are the names of a real gvproxy and of usernet under that name for Daemon.
const (
	RealGvproxy = "real-gvproxy"
	Gvproxy     = "gvproxy"
)

func (m *Machines) prepare(ctx context.Context) error {
	image, err := m.programs(ctx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(m.Dir, "image.tar"), []byte(image), 0o644); err != nil {
		return err
	}
	peer, err := os.ReadFile(Peer("gvproxy"))
	if err != nil {
		return err
	}
	bin := filepath.Join(m.Dir, "bin")
	if err := os.WriteFile(filepath.Join(bin, RealGvproxy), peer, 0o755); err != nil {
		return err
	}
	if err := os.Symlink("usernet", filepath.Join(bin, Gvproxy)); err != nil {
		return err
	}
	if err := os.Mkdir(m.Own, 0o711); err != nil {
		return err
	}
	if err := m.Give(m.Own); err != nil {
		return err
	}
	// As an administrator lets ordinary users ping, which the gateway does for its guests.
	return m.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
	})
}

// Give makes a file the user's.
func (m *Machines) Give(path string) error { return os.Chown(path, machineUser, machineUser) }

// Daemon is a program that runs in the pretend host until it is stopped.
type Daemon struct{ *process }

// Daemon starts a program of the pretend host, or of those that Machines names, as the user. It has files from descriptor 3 on.
// Its log is NAME.log in the host's directory.
func (m *Machines) Daemon(files []*os.File, name string, args ...string) (Daemon, error) {
	path := name
	if own := filepath.Join(m.Dir, "bin", name); exists(own) {
		path = own
	}
	cmd := m.Command(context.Background(), path, args...)
	cmd.Args[0] = name
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: machineUser, Gid: machineUser}}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=" + m.Own}
	p, err := m.spawnCommand(cmd)
	return Daemon{p}, err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Ready waits until probe succeeds; it fails when the program ends before that or ctx does.
func (d Daemon) Ready(ctx context.Context, probe func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return d.ready(ctx, probe)
}

// Stop sends the program a signal and waits for its end. One that has ended is fine.
func (d Daemon) Stop(sig syscall.Signal) error { return d.stop(sig) }

// Signal sends the program a signal that it goes on after.
func (d Daemon) Signal(sig syscall.Signal) error { return d.cmd.Process.Signal(sig) }

// Ended is closed when the program has ended.
func (d Daemon) Ended() <-chan struct{} { return d.done }

// Status is the exit status of a program that has ended; -1: a signal ended it.
func (d Daemon) Status() int { return d.cmd.ProcessState.ExitCode() }
