package engine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
)

// user is an ordinary user of a pretend host, who has Podman for themselves.
type user struct {
	name    string
	id      int
	runtime string // $XDG_RUNTIME_DIR
}

// NewRootless is NewPodman for an ordinary user: Podman and Usernet run as that one, StartUsernet starts the user's
// daemon, and Run is still the host's root.
func NewRootless(ctx context.Context, kind PodmanKind) (_ *Podman, err error) {
	p, err := newPodman(kind)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.user, err = p.addUser(ctx, "ann", 1000); err != nil {
		return nil, fmt.Errorf("%s: add a user: %w", kind.Name, err)
	}
	return p, p.loadImage(ctx)
}

// addUser makes a user, as an administrator makes one who shall have Podman, and what the login would make.
func (p *Podman) addUser(ctx context.Context, name string, id int) (*user, error) {
	u := &user{name, id, filepath.Join("/run/user", strconv.Itoa(id))}
	own, home := filepath.Join(p.Dir, name), filepath.Join("/home", name)
	_, err := p.Run(ctx, "sh", "-c", fmt.Sprintf(`
		set -e
		useradd -m -u %[2]d -s /bin/sh %[1]s
		grep -q ^%[1]s: /etc/subuid || echo %[1]s:%[2]d00:65536 | tee -a /etc/subuid >>/etc/subgid
		install -d -m 700 -o %[1]s -g %[1]s %[3]s %[4]s %[5]s/.config %[5]s/.config/containers
		printf '[storage]\ndriver = "overlay"\nrunroot = "%[3]s/containers"\ngraphroot = "%[4]s/storage"\n' >%[5]s/.config/containers/storage.conf
		# The machine's device may be for root only.
		[ -e /run/tun ] || mknod -m 666 /run/tun c 10 200
		mount --bind /run/tun /dev/net/tun`, name, id, u.runtime, own, home))
	if err != nil {
		return nil, err
	}
	return u, p.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
	})
}

// become makes a command that Command prepared the user's. A nil user is root.
func (u *user) become(cmd *exec.Cmd) *exec.Cmd {
	if u == nil {
		return cmd
	}
	id := uint32(u.id)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	cmd.Env = []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/home/" + u.name, "USER=" + u.name, "XDG_RUNTIME_DIR=" + u.runtime,
	}
	return cmd
}

// UsernetDir is the run directory of usernet in the pretend host.
func (h *Host) UsernetDir() string {
	if h.user == nil {
		return RunDir
	}
	return filepath.Join(h.user.runtime, "usernet")
}

// AddUser adds another user with Podman and the test image of their own.
func (p *Podman) AddUser(ctx context.Context, name string, id int) (*Podman, error) {
	u, err := p.addUser(ctx, name, id)
	if err != nil {
		return nil, err
	}
	host := *p.Host
	other := &Podman{Host: &host, Kind: p.Kind}
	host.user, host.usernet = u, nil
	file := filepath.Join(p.Dir, p.user.name, "image.tar")
	if _, err := p.Podman(ctx, "save", "-o", file, Image); err != nil {
		return nil, err
	}
	if _, err := p.Run(ctx, "install", "-o", name, file, filepath.Join(p.Dir, name)); err != nil {
		return nil, err
	}
	_, err = other.Podman(ctx, "load", "-i", filepath.Join(p.Dir, name, "image.tar"))
	return other, err
}
