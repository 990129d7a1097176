//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver/netavark"
	"github.com/usernet/usernet/internal/netns"
)

// rootless tells whether this program is an ordinary user's: also where that is root of a user namespace, but the network
// is the host's. (Root of a whole container is root.)
func rootless() bool {
	if os.Geteuid() != 0 || netavark.Rootless() {
		return true
	}
	own, err := netns.Own()
	return err == nil && !own
}

// daemonDefaults is the configuration of the daemon that is in charge of this user, where its file says nothing.
func daemonDefaults() config.Daemon {
	if !rootless() {
		return config.DefaultDaemon()
	}
	return config.UserDaemon(userDir("XDG_RUNTIME_DIR", filepath.Join("/run/user", userID())), userDir("XDG_STATE_HOME", inHome(".local/state")))
}

// configFile is read when it exists; a file named by --config must.
func configFile() string {
	if !rootless() {
		return "/etc/usernet/usernet.conf"
	}
	return filepath.Join(userDir("XDG_CONFIG_HOME", inHome(".config")), "usernet/usernet.conf")
}

// userDir is a directory of the user's (XDG Base Directory Specification).
func userDir(variable, otherwise string) string {
	if dir := os.Getenv(variable); filepath.IsAbs(dir) {
		return dir
	}
	return otherwise
}

// inHome is a path below the user's home directory. Hooks of OCI runtimes do without an environment.
func inHome(path string) string {
	home := os.Getenv("HOME")
	if home == "" {
		home = "/"
		if u, err := user.LookupId(userID()); err == nil {
			home = u.HomeDir
		}
	}
	return filepath.Join(home, path)
}

// userID is the user's number outside of the user namespace that this program is in (user_namespaces(7)).
func userID() string {
	id := os.Geteuid()
	text, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return strconv.Itoa(id)
	}
	for line := range strings.Lines(string(text)) {
		var inside, outside, count int
		if _, err := fmt.Sscan(line, &inside, &outside, &count); err == nil && inside <= id && id-inside < count {
			return strconv.Itoa(outside + id - inside)
		}
	}
	return strconv.Itoa(id)
}

// Podman's variables for those who run in its user namespace. The first is the one that matters.
const (
	inUserNamespace = "_CONTAINERS_USERNS_CONFIGURED"
	outerUID        = "_CONTAINERS_ROOTLESS_UID"
	outerGID        = "_CONTAINERS_ROOTLESS_GID"
)

// joinPodman goes on as root in rootless Podman's user and mount namespace, where containers' network namespaces can be
// entered. The network stays the host's. It returns only after a failure.
//
// A Go process has threads from its start, and so cannot enter a user namespace itself: nsenter(1) does it in between.
// The process stays the same, with what systemd gave to it. (Under podman unshare it would be another one.)
func joinPodman(ctx context.Context, command []string) error {
	if netavark.Rootless() {
		return errors.New("enter Podman's user namespace: nobody is root there")
	}
	// This makes the namespaces if they are not there, and the process that keeps them.
	if out, err := exec.CommandContext(ctx, "podman", "unshare", "true").CombinedOutput(); err != nil {
		return fmt.Errorf("an ordinary user's daemon works in Podman's user namespace: podman unshare: %w: %s", err, strings.TrimSpace(string(out)))
	}
	keeper := filepath.Join(filepath.Dir(daemonDefaults().RunDir), "libpod/tmp/pause.pid")
	text, err := os.ReadFile(keeper)
	if err != nil {
		return fmt.Errorf("find Podman's user namespace: %w", err)
	}
	pid, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 31)
	if err != nil {
		return fmt.Errorf("find Podman's user namespace: %s: %w", keeper, err)
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return fmt.Errorf("enter Podman's user namespace: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for name, value := range map[string]string{
		inUserNamespace: "done", outerUID: strconv.Itoa(os.Getuid()), outerGID: strconv.Itoa(os.Getgid()),
	} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	args := []string{"nsenter", "--preserve-credentials", fmt.Sprintf("--user=/proc/%d/ns/user", pid), fmt.Sprintf("--mount=/proc/%d/ns/mnt", pid), "--", self}
	return fmt.Errorf("run nsenter: %w", unix.Exec(nsenter, append(args, command...), os.Environ()))
}
