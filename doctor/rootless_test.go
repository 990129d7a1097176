package doctor

import (
	"context"
	"testing"

	"github.com/usernet/usernet/config"
)

// own is a machine whose user has a daemon of their own, or could.
func own(w world) *machine {
	m := w.machine()
	m.cfg.Daemon = config.UserDaemon("/run/user/1000", "/home/u/.local/state")
	return m
}

func TestUsersDaemon(t *testing.T) {
	podman := map[string]string{"/usr/bin/podman": "#!", "/run/systemd/system/x": "", "/usr/bin/systemctl": "#!", "/usr/bin/docker": "#!"}
	const line = "/usr/bin/systemctl --user show --property=Id,LoadState,ActiveState,UnitFileState usernet.service usernet.socket"
	units := func(socket string) map[string]string {
		return map[string]string{line: "Id=usernet.service\nLoadState=loaded\nActiveState=inactive\n\nId=usernet.socket\n" + socket}
	}
	const enabled, disabled, missing = "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n",
		"LoadState=loaded\nActiveState=inactive\nUnitFileState=disabled\n", "LoadState=not-found\nActiveState=inactive\n"
	asleep := join(podman, map[string]string{"/run/user/1000/usernet/usernet.sock": ""})
	for _, tt := range []struct {
		answer
		look func(*machine, context.Context) (finding, bool)
	}{
		{answer{name: "no Podman", status: Info, detail: "need none"}, (*machine).daemon},
		{answer{name: "no units", world: world{files: podman, commands: units(missing)}, status: Warning, detail: "/run/user/1000/usernet/usernet.sock", fix: "usernet serve &"}, (*machine).daemon},
		{answer{name: "not enabled", world: world{files: podman, commands: units(disabled)}, status: Warning, fix: "systemctl --user enable --now usernet.socket"}, (*machine).daemon},
		{answer{name: "asleep", world: world{files: asleep, commands: units(enabled)}, status: OK, detail: "systemd starts it"}, (*machine).daemon},
		{answer{name: "no manager", status: Info, detail: "start usernet serve"}, (*machine).systemd},
		{answer{name: "units missing", world: world{files: podman, commands: units(missing)}, status: Info, detail: "dist/user"}, (*machine).systemd},
		{answer{name: "units disabled", world: world{files: podman, commands: units(disabled)}, status: Warning, fix: "systemctl --user enable"}, (*machine).systemd},
		{answer{name: "units enabled", world: world{files: podman, commands: units(enabled)}, status: OK, detail: "starts when Podman calls"}, (*machine).systemd},
		{answer{name: "Docker", world: world{files: podman}, status: Info, detail: "system's daemon", fix: "sudo usernet doctor"}, (*machine).dockerDriver},
		{answer{name: "no Docker"}, (*machine).dockerDriver},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.compare(t, own(tt.world), tt.look) })
	}
}

func TestSubordinateIDs(t *testing.T) {
	files := func(subuid, subgid string) world {
		return world{env: map[string]string{"USER": "ann"}, files: map[string]string{"/usr/bin/podman": "#!", "/etc/subuid": subuid, "/etc/subgid": subgid}}
	}
	elsewhere := files("", "")
	elsewhere.files["/etc/nsswitch.conf"] = "passwd: files\nsubid: sss\n"
	passwd := files("anna:100000:65536\n", "anna:100000:65536\n")
	passwd.files["/etc/passwd"] = "root:x:0:0::/root:/bin/sh\nanna:x:1000:1000::/home/anna:/bin/sh\n"
	for _, a := range []answer{
		{name: "no Podman"},
		{name: "by name", world: files("bob:1:1\nann:100000:65536\n", "ann:100000:65536\n"), status: OK, detail: "you have some"},
		{name: "by the name in passwd", world: passwd, status: OK, detail: "you have some"},
		{name: "by number", world: files("1000:100000:65536\n", "1000:100000:65536\n"), status: OK, detail: "you have some"},
		{name: "none", world: files("bob:100000:65536\n", "ann:100000:65536\n"), status: Warning, detail: "/etc/subuid", fix: "sudo usermod --add-subuids"},
		{name: "no groups", world: files("ann:100000:65536\n", ""), status: Warning, detail: "/etc/subgid", fix: "sudo usermod --add-subuids"},
		{name: "elsewhere", world: elsewhere},
		{name: "root", world: world{root: true, files: map[string]string{"/usr/bin/podman": "#!"}}},
	} {
		a.check(t, (*machine).subordinateIDs)
	}
}
