package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/dns/resolvconf"
)

// usermode is the question of all questions, answered by a network made for a try.
func (m *machine) usermode(ctx context.Context) (f finding, ok bool) {
	defer func() { f.essential = true }()
	t := m.ownRights(ctx)
	if errno, refused := t.refused(); refused {
		if m.uid == 0 {
			return say(Missing, "root may not make network namespaces here (%v): this container needs CAP_SYS_ADMIN and CAP_NET_ADMIN (--privileged).", errno)
		}
		return say(Missing, "could not be made, for lack of user namespaces.")
	}
	if t.err != nil {
		return say(Missing, "could not be made: %v.", t.err)
	}
	if t.results[tryUsermode].Errno == unix.EROFS {
		return say(Missing, "could not be made: /proc/sys is read-only here. If this is a container, start it with --privileged.")
	}
	if why, _ := t.failed(tryUsermode); why != "" {
		return say(Missing, "could not be made: %s.", why)
	}
	return say(OK, "a usermode network was made and taken away again: they work for you.")
}

func (m *machine) configuration(context.Context) (finding, bool) {
	if errors.Is(m.cfg.Faulty, fs.ErrPermission) {
		return say(Info, "you may not read %s; the daemon may be elsewhere than this looks.", m.cfg.File)
	}
	if m.cfg.Faulty != nil {
		return fix(m.perUser("sudoedit "+m.cfg.File, "${EDITOR:-vi} "+m.cfg.File), Missing, "the daemon will not start: %v.", m.cfg.Faulty)
	}
	if !m.exists(m.cfg.File) {
		return say(OK, "all defaults: there is no %s.", m.cfg.File)
	}
	return say(OK, "%s is understood.", m.cfg.File)
}

func (m *machine) daemon(ctx context.Context) (finding, bool) {
	socket := m.cfg.Daemon.ControlSocket
	if m.asleep(ctx, "usernet", socket) {
		return say(OK, "systemd starts it when it is called at %s.", socket)
	}
	d, err := m.cfg.Ask(ctx, socket)
	switch {
	case absent(err) && m.usersOwn():
		return m.absentOfUser(ctx, socket)
	case absent(err):
		command := m.sudo("usernet serve")
		if m.ask(ctx)["usernet.service"].loaded {
			command = m.sudo(enable)
		}
		return fix(command, Warning, "none answers at %s. Docker and Podman need it; usernet run does not.", socket)
	case errors.Is(err, fs.ErrPermission):
		return fix("sudo usernet doctor", Info, "the system's daemon is at %s; only root may ask it.", socket)
	case err != nil:
		return say(Warning, "it does not answer: %v.", plain(err))
	case len(d.Down) > 0:
		return fix(m.perUser("journalctl -u usernet", "journalctl --user -u usernet"), Warning, "it runs, but cannot bring back: %s. Its log says why.", strings.Join(d.Down, ", "))
	}
	return say(OK, "it answers at %s and has %s.", socket, count(d.Networks, "network"))
}

// version compares the daemon's version with ours, by asking the program that the process runs.
func (m *machine) version(ctx context.Context) (finding, bool) {
	socket := m.cfg.Daemon.ControlSocket
	if m.asleep(ctx, "usernet", socket) {
		return say(Info, "this is %s.", m.cfg.Version)
	}
	program, err := listener(ctx, socket)
	if err == nil {
		var text string
		if text, err = m.run(ctx, program, "version"); err == nil {
			return m.compare(strings.TrimPrefix(firstLine(text), "usernet "))
		}
	}
	return say(Info, "this is %s.", m.cfg.Version)
}

func (m *machine) compare(daemon string) (finding, bool) {
	if daemon == m.cfg.Version {
		return say(OK, "the daemon and this program are both %s.", daemon)
	}
	return fix(m.perUser(m.sudo("systemctl restart usernet"), "systemctl --user restart usernet"), Warning, "the daemon is %s, this program is %s. Containers survive a restart of it.", daemon, m.cfg.Version)
}

// listener is the program of the process that listens at a socket, if it is usernet; it may be systemd. The file works
// even if the program was replaced on disk since.
func listener(ctx context.Context, socket string) (string, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return "", err
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "", err
	}
	var peer *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return "", cerr
	}
	if err != nil {
		return "", os.NewSyscallError("SO_PEERCRED", err)
	}
	exe := fmt.Sprintf("/proc/%d/exe", peer.Pid)
	target, err := os.Readlink(exe)
	if err != nil {
		return "", err
	}
	if name := path.Base(strings.TrimSuffix(target, " (deleted)")); name != "usernet" {
		return "", fmt.Errorf("%s listens at %s", name, socket)
	}
	return exe, nil
}

// resolvers lists where names are asked that are not a network's own.
func (m *machine) resolvers(context.Context) (finding, bool) {
	text, err := m.read(resolvconf.Path)
	if err != nil {
		return say(Warning, "%s cannot be read: containers can resolve no names but each other's.", resolvconf.Path)
	}
	servers := resolvconf.Parse([]byte(text)).Servers
	if len(servers) == 0 {
		return say(Warning, "%s names none; a resolver on this machine itself would be asked.", resolvconf.Path)
	}
	var names []string
	loopback := false
	for _, s := range servers {
		names = append(names, s.Addr().String())
		loopback = loopback || s.Addr().IsLoopback()
	}
	if loopback {
		return say(OK, "%s (on this machine itself, which is fine: usernet asks it for the containers).", strings.Join(names, ", "))
	}
	return say(OK, "%s, for what containers ask.", strings.Join(names, ", "))
}

func count(n int, what string) string {
	switch n {
	case 0:
		return "no " + what
	case 1:
		return "one " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
