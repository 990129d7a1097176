package ocihook

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/dns/resolvconf"
	"github.com/usernet/usernet/driver/control"
)

// resolver mounts a resolv.conf(5) for the container that leads to the resolver of its network. Its root directory stays as it is, since
// several containers may have the same one; only where there is no resolv.conf at all, an empty one is made there to be covered.
func (h *Hook) resolver(st state, b bundle, w wish, got control.Attached) error {
	rootfs := st.rootfs(b)
	switch {
	case w.resolv == resolvOff, rootfs == "":
		return nil
	case st.Status != "" && !st.starting():
		return nil // the container's process is in its root already
	case w.resolv == resolvAuto && b.mountsResolver(st.ID):
		return nil
	}
	text := resolvText(w, got)
	if text == "" {
		return nil
	}
	file, err := h.temporary(text)
	if err != nil {
		return err
	}
	defer os.Remove(file) // the mount keeps what is in it
	err = cover(st.Pid, rootfs, file)
	if w.resolv == resolvAuto && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EROFS)) {
		return nil // it has no /etc, and nobody looks there
	}
	if err != nil {
		return fmt.Errorf("mount the container's resolv.conf (usernet.resolv_conf=off leaves it alone): %w", err)
	}
	return nil
}

// temporary makes a file that everybody may read.
func (h *Hook) temporary(text string) (path string, err error) {
	if err := os.MkdirAll(h.RunDir, 0o711); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(h.RunDir, "resolv-")
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return "", errors.Join(fmt.Errorf("write %s: %w", f.Name(), err), os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// mountsResolver tells whether the bundle mounts a resolv.conf of somebody's choice. One that an engine made for just this container,
// in a directory called after it, knows nothing of our network.
func (b bundle) mountsResolver(id string) bool {
	for _, m := range b.Mounts {
		if filepath.Clean("/"+m.Destination) != resolvconf.Path {
			continue
		}
		dirs := strings.Split(filepath.Dir(m.Source), "/")
		return filepath.Base(m.Source) != "resolv.conf" || !slices.Contains(dirs, id)
	}
	return false
}

// resolvText is the container's resolv.conf: the servers that it wants, those of its network, or those of the host that it can
// reach. It is empty if there are none.
func resolvText(w wish, got control.Attached) string {
	servers, search := w.servers, got.Search
	if len(servers) == 0 {
		servers = got.DNS
	}
	if len(servers) == 0 || len(search) == 0 {
		text, err := os.ReadFile(resolvconf.Path)
		if err == nil {
			host := resolvconf.Parse(text)
			if len(search) == 0 {
				search = host.Search
			}
			if len(servers) == 0 {
				servers = reachable(host.Servers)
			}
		}
	}
	if len(servers) == 0 {
		return ""
	}
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	return b.String()
}

// reachable are the servers that are not on the host itself and listen where resolv.conf can say.
func reachable(servers []netip.AddrPort) []netip.Addr {
	var as []netip.Addr
	for _, s := range servers {
		a := s.Addr()
		if s.Port() == 53 && !a.IsLoopback() && !a.IsUnspecified() && !a.IsLinkLocalUnicast() && !slices.Contains(as, a) {
			as = append(as, a)
		}
	}
	return as
}

// cover mounts a file read-only over /etc/resolv.conf below rootfs, in the mount namespace of a process: the container's, before it
// goes into its root (pivot_root(2)).
func cover(pid int, rootfs, file string) error {
	mnt, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return err
	}
	defer mnt.Close()
	theirs, err := mnt.Stat()
	if err != nil {
		return err
	}
	if mine, err := os.Stat("/proc/self/ns/mnt"); err != nil || os.SameFile(mine, theirs) {
		return err // it sees the host's mounts: what is mounted for it is mounted for all
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, file, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone the mount of %s: %w", file, err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil && !errors.Is(err, unix.ENOSYS) { // before Linux 5.12
		return fmt.Errorf("make the mount of %s read-only: %w", file, err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with this goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Setns(int(mnt.Fd()), unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("enter the container's mount namespace: %w", err)
			}
			return mountBelow(rootfs, tree)
		}()
	}()
	return <-done
}

// mountBelow mounts a detached tree over etc/resolv.conf of a root directory, which no symbolic link leads out of.
func mountBelow(rootfs string, tree int) error {
	root, err := unix.Open(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", rootfs, err)
	}
	defer unix.Close(root)
	target, err := openBelow(root, "etc/resolv.conf", 0)
	if errors.Is(err, unix.ENOENT) {
		target, err = makeTarget(root)
	}
	if err != nil {
		return fmt.Errorf("open /etc/resolv.conf in %s: %w", rootfs, err)
	}
	defer unix.Close(target)
	err = unix.MoveMount(tree, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("mount on /etc/resolv.conf in %s: %w", rootfs, err)
	}
	return nil
}

// openBelow opens a path as a process sees it whose root directory is root. It opens nothing for reading or writing.
func openBelow(root int, path string, flags uint64) (int, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | flags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(root, path, &how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) { // EAGAIN: something was renamed meanwhile
			return fd, err
		}
	}
}

// makeTarget makes an empty etc/resolv.conf, unless a file system other than the root's is mounted there: that may be a directory of
// the host. Where it is a link that leads nowhere, the link itself is what will be covered.
func makeTarget(root int) (int, error) {
	etc, err := openBelow(root, "etc", unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	defer unix.Close(etc)
	link, err := unix.Openat(etc, "resolv.conf", unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if !errors.Is(err, unix.ENOENT) {
		return link, err
	}
	var here, top unix.Statx_t
	for _, s := range []struct {
		fd int
		to *unix.Statx_t
	}{{etc, &here}, {root, &top}} {
		if err := unix.Statx(s.fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, s.to); err != nil {
			return -1, err
		}
	}
	if here.Mnt_id != top.Mnt_id {
		return -1, unix.ENOENT
	}
	return unix.Openat(etc, "resolv.conf", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
}
