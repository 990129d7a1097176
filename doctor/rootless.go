package doctor

import (
	"context"
	"strconv"
	"strings"
)

// usersOwn tells whether the daemon is the user's, for rootless Podman. That one is not for Docker.
func (m *machine) usersOwn() bool { return m.uid != 0 && m.cfg.Daemon.PluginSocket == "" }

// perUser chooses between a command for the system's daemon and one for the user's.
func (m *machine) perUser(system, user string) string {
	if m.usersOwn() {
		return user
	}
	return system
}

const enableUser = "systemctl --user enable --now usernet.socket"

// askUser asks the service manager of the user; nil if there is none.
func (m *machine) askUser(ctx context.Context) map[string]unit {
	return m.ofUser.get(func() map[string]unit {
		return m.show(ctx, []string{"usernet.service", "usernet.socket"}, "--user")
	})
}

// absentOfUser is for a user without a daemon.
func (m *machine) absentOfUser(ctx context.Context, socket string) (finding, bool) {
	if _, ok := m.find("podman"); !ok {
		return say(Info, "you have none, and need none without Podman. usernet run works without.")
	}
	command := "usernet serve &"
	if m.askUser(ctx)["usernet.socket"].loaded {
		command = enableUser
	}
	return fix(command, Warning, "none answers at %s. podman network create starts one; containers on networks that are there already cannot.", socket)
}

// userUnits is systemd for a daemon of the user's.
func (m *machine) userUnits(ctx context.Context) (finding, bool) {
	us := m.askUser(ctx)
	socket := us["usernet.socket"]
	switch {
	case us == nil:
		return say(Info, "it manages no services of yours: if you use Podman, start usernet serve after each start of the machine.")
	case !socket.loaded:
		return say(Info, "usernet's units for users are not installed. They are in dist/user of the source, for ~/.config/systemd/user.")
	case !socket.enabled || !socket.active:
		return fix(enableUser, Warning, "usernet's units are installed, but not enabled: containers that start with the machine find no daemon.")
	}
	return say(OK, "usernet's units are enabled: it starts when Podman calls.")
}

// subordinateIDs looks for what rootless Podman needs to be more than one user.
func (m *machine) subordinateIDs(context.Context) (finding, bool) {
	if _, ok := m.find("podman"); !ok || m.uid == 0 {
		return silence()
	}
	if text, err := m.read("/etc/nsswitch.conf"); err == nil && strings.Contains(text, "\nsubid:") {
		return silence() // they are elsewhere (subid(5))
	}
	name := m.userName()
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		text, err := m.read(file)
		if err == nil && hasIDs(text, name, strconv.Itoa(m.uid)) {
			continue
		}
		return fix(m.sudo("usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "+name), Warning,
			"you have none in %s: rootless Podman runs few images then.", file)
	}
	return say(OK, "you have some, for the users in your containers.")
}

// userName is what /etc/passwd calls the user, or the environment.
func (m *machine) userName() string {
	text, err := m.read("/etc/passwd")
	if err != nil {
		return m.getenv("USER")
	}
	for line := range strings.Lines(text) {
		if f := strings.Split(line, ":"); len(f) > 2 && f[2] == strconv.Itoa(m.uid) {
			return f[0]
		}
	}
	return m.getenv("USER")
}

// hasIDs tells whether a file as of subuid(5) has a line for one of names.
func hasIDs(text string, names ...string) bool {
	for line := range strings.Lines(text) {
		owner, _, _ := strings.Cut(line, ":")
		for _, name := range names {
			if owner == name && name != "" {
				return true
			}
		}
	}
	return false
}
