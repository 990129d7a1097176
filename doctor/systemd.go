package doctor

import (
	"context"
	"slices"
	"strings"
)

// unitNames are the units that come with usernet, and those of others that listen for a sleeping service.
var unitNames = []string{"usernet.service", "usernet.socket", "usernet-control.socket", "docker.service", "docker.socket"}

// unit is what systemd says of one; the zero value: nothing.
type unit struct {
	loaded, active, enabled bool
}

// units are asked for once.
type units struct {
	once[map[string]unit]
}

// ask asks systemd; nil if it is not in charge of this machine. Asking starts nothing.
func (m *machine) ask(ctx context.Context) map[string]unit {
	return m.units.get(func() map[string]unit { return m.show(ctx, unitNames) })
}

// show asks for some units. flags come before them.
func (m *machine) show(ctx context.Context, names []string, flags ...string) map[string]unit {
	program, ok := m.find("systemctl")
	if !ok || !m.exists("/run/systemd/system") { // as sd_booted(3) looks
		return nil
	}
	args := append(flags, "show", "--property=Id,LoadState,ActiveState,UnitFileState")
	text, err := m.run(ctx, program, append(args, names...)...)
	if err != nil {
		return nil
	}
	return parseUnits(text)
}

// parseUnits reads blocks of NAME=VALUE lines.
func parseUnits(text string) map[string]unit {
	units := map[string]unit{}
	for block := range strings.SplitSeq(text, "\n\n") {
		properties := map[string]string{}
		for line := range strings.Lines(block) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			properties[name] = value
		}
		if id := properties["Id"]; id != "" {
			units[id] = unit{
				loaded:  properties["LoadState"] == "loaded",
				active:  properties["ActiveState"] == "active",
				enabled: properties["UnitFileState"] == "enabled",
			}
		}
	}
	return units
}

// asleep tells whether systemd listens in the place of a service that does not run. A call would start it, and doctor
// starts nothing.
func (m *machine) asleep(ctx context.Context, service, socket string) bool {
	us := m.ask(ctx)
	if m.usersOwn() && service == "usernet" {
		us = m.askUser(ctx)
	}
	listens := us[service+".socket"].active || service == "usernet" && us["usernet-control.socket"].active
	return listens && !us[service+".service"].active && m.exists(socket)
}

const enable = "systemctl enable --now usernet.socket usernet-control.socket usernet.service"

func (m *machine) systemd(ctx context.Context) (finding, bool) {
	if m.usersOwn() {
		return m.userUnits(ctx)
	}
	us := m.ask(ctx)
	if us == nil {
		return say(Info, "it does not run this machine: start usernet serve by other means. (Podman starts it by itself.)")
	}
	names := unitNames[:3]
	all := func(is func(unit) bool) bool {
		return !slices.ContainsFunc(names, func(name string) bool { return !is(us[name]) })
	}
	switch {
	case !all(func(u unit) bool { return u.loaded }):
		return say(Info, "usernet's units are not installed, so usernet does not start with the machine. They are in dist/ of the source.")
	case !all(func(u unit) bool { return u.enabled }):
		return fix(m.sudo(enable), Warning, "usernet's units are installed, but not all enabled: it does not start with the machine.")
	case !us["usernet.socket"].active || !us["usernet-control.socket"].active:
		return fix(m.sudo(enable), Warning, "usernet's units are enabled, but the sockets are not listened at.")
	}
	return say(OK, "usernet's units are enabled: it starts with the machine.")
}
