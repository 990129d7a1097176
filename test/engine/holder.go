package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const holderEnv = "USERNET_TEST_HOLDER"

// holding tells the holder how to set up the pretend host.
type holding struct {
	Root   string // the root directory of the pretend host; "" is the machine's own
	Dir    string // the engine's directory: has the same path in and outside the pretend host
	Cgroup string // the cgroup that Docker makes its own in
	Resolv string // contents of /etc/resolv.conf

	parent int // where Dir is, as a descriptor
}

// Holder is to be called first in every program that makes engines. In the process that holds a pretend host's
// namespaces it never returns; elsewhere it does nothing.
//
// The holder is the first process of its process namespace. When its standard input ends, because its maker asked for
// that or died, it kills every process in the namespace and goes; mounts and links go with it.
func Holder() {
	text := os.Getenv(holderEnv)
	if text == "" {
		return
	}
	var h holding
	err := json.Unmarshal([]byte(text), &h)
	if err == nil {
		// Behind a pivoted root, this is the only way to where the directory is.
		h.parent, err = unix.Open(filepath.Dir(h.Dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err == nil {
		err = h.mounts()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	go reap(ended)
	fmt.Println("ready")
	os.Stdin.Read(make([]byte, 1))
	h.end()
	os.Exit(0)
}

// reap collects the orphans of the namespace.
func reap(ended <-chan os.Signal) {
	for range ended {
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

// end kills everything else in the namespace and removes its cgroups, which nothing else would.
func (h holding) end() {
	top := filepath.Join("/sys/fs/cgroup", h.Cgroup)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		unix.Kill(-1, unix.SIGKILL)
		if rmdirs(top) == nil {
			break
		}
	}
	h.unmount()
	entries, _ := os.ReadDir(h.Dir)
	for _, e := range entries {
		os.RemoveAll(filepath.Join(h.Dir, e.Name()))
	}
	unix.Unlinkat(h.parent, filepath.Base(h.Dir), unix.AT_REMOVEDIR)
}

// unmount takes away what Docker mounted below the directory, so that the removal does not reach through it.
func (h holding) unmount() {
	text, _ := os.ReadFile("/proc/self/mountinfo")
	lines := strings.Split(string(text), "\n")
	slices.Reverse(lines)
	for _, line := range lines {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], h.Dir+"/") {
			unix.Unmount(f[4], unix.MNT_DETACH)
		}
	}
}

// rmdirs removes a tree of directories whose files cannot be removed.
func rmdirs(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	slices.Reverse(dirs)
	for _, d := range dirs {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove cgroup %s: %w", d, err)
		}
	}
	return nil
}

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func (h holding) mounts() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	root := "/"
	if h.Root != "" {
		root = filepath.Join(h.Dir, "root")
	}
	for _, m := range h.table(root) {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	if err := h.resolv(root); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "run/daemon.json"), []byte("{}\n"), 0o600); err != nil {
		return err
	}
	if h.Root != "" {
		if err := pivot(root); err != nil {
			return err
		}
	}
	// As a host's root is under systemd; Docker's managed plugins count on it. Only within the namespace.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return nil
}

func pivot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter %s: %w", root, err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	return unix.Chdir("/")
}

// table lists the mounts of the pretend host, in order. Docker runs with cgroup v2 whatever the machine itself mounts.
func (h holding) table(root string) []mount {
	at := func(p string) string { return filepath.Join(root, p) }
	var t []mount
	if h.Root != "" {
		up, work := filepath.Join(h.Dir, "upper"), filepath.Join(h.Dir, "work")
		os.Mkdir(up, 0o755)
		os.Mkdir(work, 0o755)
		t = append(t,
			mount{"overlay", root, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", h.Root, up, work)},
			mount{"/dev", at("dev"), "", unix.MS_BIND | unix.MS_REC, ""},
			mount{"tmpfs", at("tmp"), "tmpfs", 0, ""},
			mount{h.Dir, at(h.Dir), "", unix.MS_BIND, ""})
	}
	t = append(t,
		mount{"proc", at("proc"), "proc", 0, ""},
		mount{"sysfs", at("sys"), "sysfs", 0, ""},
		mount{"cgroup2", at("sys/fs/cgroup"), "cgroup2", 0, ""},
		mount{"tmpfs", at("run"), "tmpfs", 0, "mode=755"})
	if fi, err := os.Stat(at("etc/docker")); err == nil && fi.IsDir() {
		t = append(t, mount{"tmpfs", at("etc/docker"), "tmpfs", 0, ""})
	}
	return t
}

// resolv puts a file over /etc/resolv.conf, wherever that leads: the machine's own may be a link into /run.
func (h holding) resolv(root string) error {
	file := filepath.Join(h.Dir, "resolv.conf")
	if err := os.WriteFile(file, []byte(h.Resolv), 0o644); err != nil {
		return err
	}
	target := filepath.Join(root, "etc/resolv.conf")
	if h.Root != "" {
		os.Remove(target)
		return os.WriteFile(target, []byte(h.Resolv), 0o644)
	}
	if link, err := os.Readlink(target); err == nil {
		if !filepath.IsAbs(link) {
			link = filepath.Join(filepath.Dir(target), link)
		}
		if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
			return err
		}
		if f, err := os.OpenFile(link, os.O_CREATE, 0o644); err == nil {
			f.Close()
		}
	}
	if err := unix.Mount(file, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}
