package doctor

import (
	"context"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// serve answers HTTP requests at a socket: paths to bodies.
func serve(t *testing.T, answers map[string]string) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "usernet.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, ok := answers[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write([]byte(body))
	})}
	done := make(chan struct{})
	go func() { srv.Serve(l); close(done) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return socket
}

// awake and sleeping are what systemd tells of a service whose socket it listens at.
func systemd(active string) (files, commands map[string]string) {
	var b strings.Builder
	for _, name := range unitNames {
		state := "active"
		if strings.HasSuffix(name, ".service") {
			state = active
		}
		b.WriteString("Id=" + name + "\nLoadState=loaded\nActiveState=" + state + "\nUnitFileState=enabled\n\n")
	}
	files = map[string]string{"/run/systemd/system/x": "", "/usr/bin/systemctl": "#!"}
	line := "/usr/bin/systemctl show --property=Id,LoadState,ActiveState,UnitFileState " + strings.Join(unitNames, " ")
	return files, map[string]string{line: b.String()}
}

func TestDocker(t *testing.T) {
	host := func(answers map[string]string) map[string]string {
		return map[string]string{"DOCKER_HOST": "unix://" + serve(t, answers)}
	}
	cli := map[string]string{"/usr/bin/docker": "#!"}
	nowhere := map[string]string{"DOCKER_HOST": "unix:///nowhere/docker.sock"}
	for _, a := range []answer{
		{name: "not installed", world: world{env: nowhere}, status: Info, detail: "not installed"},
		{name: "not running", world: world{env: nowhere, files: cli}, status: Warning, detail: "no engine answers", fix: "sudo dockerd"},
		{name: "elsewhere", world: world{env: map[string]string{"DOCKER_HOST": "tcp://192.0.2.1:2375"}}, status: Info, detail: "not on this machine"},
		{name: "answers", world: world{env: host(map[string]string{"/version": `{"Version":"28.5.2"}`})}, status: OK, detail: "28.5.2"},
		{name: "old", world: world{env: host(map[string]string{"/version": `{"Version":"19.03.1"}`})}, status: Warning, detail: "20.10 and later"},
		{name: "no version", world: world{env: host(map[string]string{"/version": `[]`})}, status: Warning, detail: "does not tell"},
		{name: "other", world: world{env: host(nil)}, status: Warning, detail: "404"},
	} {
		a.check(t, (*machine).docker)
	}
	// Asking would start it.
	files, commands := systemd("inactive")
	files[dockersOwn] = ""
	answer{name: "asleep", world: world{files: files, commands: commands}, status: OK, detail: "systemd starts it"}.check(t, (*machine).docker)
}

func TestDockerDriver(t *testing.T) {
	cli := map[string]string{"/usr/bin/docker": "#!"}
	managed := serve(t, map[string]string{"/plugins": `[{"Name":"other:1","Enabled":true},{"Name":"usernet:latest","Enabled":true}]`})
	disabled := serve(t, map[string]string{"/plugins": `[{"Name":"usernet:latest","Enabled":false}]`})
	at := func(socket string, files map[string]string) world {
		return world{files: files, env: map[string]string{"DOCKER_HOST": "unix://" + socket}}
	}
	for _, tt := range []struct {
		answer
		socket string
	}{
		{answer{name: "answers", status: OK, detail: "docker network create -d usernet"}, serve(t, map[string]string{"/Plugin.Activate": `{"Implements":["NetworkDriver"]}`})},
		{answer{name: "volumes", status: Warning, detail: "no network driver"}, serve(t, map[string]string{"/Plugin.Activate": `{"Implements":["VolumeDriver"]}`})},
		{answer{name: "garbage", status: Warning, detail: "no network driver"}, serve(t, map[string]string{"/Plugin.Activate": `hello`})},
		{answer{name: "refuses", status: Warning, detail: "404"}, serve(t, nil)},
		{answer{name: "managed", world: at(managed, cli), status: OK, detail: "-d usernet:latest"}, "/nowhere/usernet.sock"},
		{answer{name: "disabled", world: at(disabled, cli), status: Warning, detail: "does not know", fix: "sudo usernet serve"}, "/nowhere/usernet.sock"},
		{answer{name: "no Docker", world: at("/nowhere/s", nil)}, "/nowhere/usernet.sock"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := tt.world.machine()
			m.cfg.Daemon.PluginSocket = tt.socket
			tt.compare(t, m, (*machine).dockerDriver)
		})
	}
	files, commands := systemd("inactive")
	files["/run/docker/plugins/usernet.sock"] = ""
	answer{name: "asleep", world: world{files: files, commands: commands}, status: OK, detail: "systemd starts usernet"}.check(t, (*machine).dockerDriver)
}

func TestPodman(t *testing.T) {
	installed := map[string]string{"/usr/bin/podman": "#!"}
	prints := func(text string) map[string]string { return map[string]string{"/usr/bin/podman --version": text} }
	for _, a := range []answer{
		{name: "not installed", status: Info, detail: "not installed"},
		{name: "new", world: world{files: installed, commands: prints("podman version 5.4.2")}, status: OK, detail: "5.4.2"},
		{name: "old", world: world{files: installed, commands: prints("podman version 4.3.1")}, status: Warning, detail: "4.5 and later"},
		{name: "broken", world: world{files: installed, commands: prints("!no conmon")}, status: Warning, detail: "no conmon"},
	} {
		a.check(t, (*machine).podman)
	}
}

func TestNetavark(t *testing.T) {
	podman := map[string]string{"/usr/bin/podman": "#!", "/usr/bin/apk": "#!"}
	helper := join(podman, map[string]string{"/usr/lib/podman/netavark": "#!"})
	prints := func(text string) map[string]string {
		return map[string]string{"/usr/lib/podman/netavark --version": text}
	}
	for _, a := range []answer{
		{name: "no Podman"},
		{name: "not installed", world: world{files: podman}, status: Warning, detail: "not installed", fix: "apk add netavark"},
		{name: "new", world: world{files: helper, commands: prints("netavark 1.14.0")}, status: OK, detail: "1.14.0"},
		{name: "old", world: world{files: helper, commands: prints("netavark 1.4.0")}, status: Warning, detail: "from 1.6"},
		{name: "broken", world: world{files: helper, commands: prints("!segfault")}, status: Warning, detail: "segfault"},
		{name: "in the path", status: OK, detail: "2.1.0", world: world{
			files:    join(podman, map[string]string{"/usr/bin/netavark": "#!"}),
			commands: map[string]string{"/usr/bin/netavark --version": "netavark 2.1.0"},
		}},
	} {
		a.check(t, (*machine).netavark)
	}
}

func TestPodmanDriver(t *testing.T) {
	const program = "/usr/libexec/netavark/usernet"
	podman := map[string]string{"/usr/bin/podman": "#!"}
	driver := join(podman, map[string]string{program: "#!"})
	prints := func(text string) map[string]string { return map[string]string{program + " info": text} }
	conf := func(text string) map[string]string {
		return join(driver, map[string]string{"/etc/containers/containers.conf": text})
	}
	for _, a := range []answer{
		{name: "no Podman"},
		{name: "not there", world: world{files: podman}, status: Warning, detail: "/usr/local/libexec/netavark", fix: "sudo install -D /opt/usernet /usr/local/libexec/netavark/usernet"},
		{name: "there", world: world{files: driver, commands: prints(`{"version":"v1","api_version":"1.0.0"}`)}, status: OK, detail: program},
		{name: "other version", world: world{files: driver, commands: prints(`{"version":"v0"}`)}, status: Warning, detail: "is version v0, this is v1", fix: "install -D /opt/usernet " + program},
		{name: "broken", world: world{files: driver, commands: prints(`usage`)}, status: Warning, detail: "does not answer", fix: "install"},
		{name: "not executable", world: world{files: join(podman, map[string]string{program: "x"})}, status: Warning, detail: "in none", fix: "install"},
		{name: "none allowed", world: world{files: conf("[network]\nnetavark_plugin_dirs = []\n")}, status: Warning, detail: "is empty"},
		{name: "bad file", world: world{files: conf("[network\n")}, status: Warning, detail: "containers.conf"},
		{name: "elsewhere", world: world{files: conf("[network]\nnetavark_plugin_dirs = [\"/opt/drivers\"]\n")}, status: Warning, detail: "/opt/drivers", fix: "/opt/drivers/usernet"},
		{name: "at home", status: Warning, fix: "install -D /opt/usernet /home/u/drivers/usernet", world: world{
			files: conf("[network]\nnetavark_plugin_dirs = [\"/home/u/drivers\"]\n"), env: map[string]string{"HOME": "/home/u"},
		}},
	} {
		a.check(t, (*machine).podmanDriver)
	}
}

func TestPluginDirs(t *testing.T) {
	dirs := func(list string) string { return "[network]\nnetavark_plugin_dirs = " + list + "\n" }
	files := map[string]string{
		"/usr/share/containers/containers.conf":            dirs(`["/a"]`),
		"/etc/containers/containers.conf":                  "[engine]\n",
		"/etc/containers/containers.conf.d/20-b.conf":      dirs(`["/c", {append=true}]`),
		"/etc/containers/containers.conf.d/10-a.conf":      dirs(`["/b", {append=true}]`),
		"/home/u/.config/containers/containers.conf":       dirs(`["/d", {append=true}]`),
		"/xdg/containers/containers.conf.d/00.conf":        dirs(`["/e"]`),
		"/etc/containers/containers.conf.d/not-a-drop-in~": dirs(`["/z"]`),
	}
	for name, tt := range map[string]struct {
		world world
		want  []string
	}{
		"defaults":    {world{}, driverDirs},
		"root":        {world{files: files, root: true, env: map[string]string{"HOME": "/home/u"}}, []string{"/a", "/b", "/c"}},
		"user":        {world{files: files, env: map[string]string{"HOME": "/home/u"}}, []string{"/a", "/b", "/c", "/d"}},
		"xdg":         {world{files: files, env: map[string]string{"HOME": "/home/u", "XDG_CONFIG_HOME": "/xdg"}}, []string{"/e"}},
		"environment": {world{files: files, env: map[string]string{"CONTAINERS_CONF": "/usr/share/containers/containers.conf"}}, []string{"/a"}},
	} {
		got, err := tt.world.machine().pluginDirs()
		if d := cmp.Diff(tt.want, got); err != nil || d != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, d)
		}
	}
}

func TestContainerd(t *testing.T) {
	installed := map[string]string{"/usr/bin/containerd": "#!"}
	commands := map[string]string{"/usr/bin/containerd --version": "containerd example.org/containerd 1.7.24 abc"}
	answer{name: "none"}.check(t, (*machine).containerd)
	answer{name: "stopped", world: world{files: installed, commands: commands}, status: Info, detail: "1.7.24, not running"}.check(t, (*machine).containerd)
	running := join(installed, map[string]string{"/run/containerd/containerd.sock": ""})
	answer{name: "runs", world: world{files: running, commands: commands}, status: Info, detail: "/run/containerd"}.check(t, (*machine).containerd)
	broken := map[string]string{"/usr/bin/containerd --version": "!killed"}
	answer{name: "broken", world: world{files: installed, commands: broken}, status: Warning, detail: "killed"}.check(t, (*machine).containerd)
}

func TestCNI(t *testing.T) {
	answer{name: "none"}.check(t, (*machine).cni)
	files := map[string]string{"/opt/cni/bin/bridge": "#!", "/etc/cni/net.d/10.conflist": "{}"}
	answer{name: "there", world: world{files: files}, status: Info, detail: "/opt/cni/bin, /etc/cni/net.d"}.check(t, (*machine).cni)
}

func TestDaemon(t *testing.T) {
	says := func(d Daemon, err error) func(context.Context, string) (Daemon, error) {
		return func(context.Context, string) (Daemon, error) { return d, err }
	}
	files, commands := systemd("active")
	for _, tt := range []struct {
		answer
		ask func(context.Context, string) (Daemon, error)
	}{
		{answer{name: "answers", status: OK, detail: "one network"}, says(Daemon{Networks: 1}, nil)},
		{answer{name: "down", status: Warning, detail: "abc, def", fix: "journalctl"}, says(Daemon{Networks: 2, Down: []string{"abc", "def"}}, nil)},
		{answer{name: "absent", status: Warning, detail: "none answers", fix: "sudo usernet serve"}, noDaemon},
		{answer{name: "absent unit", world: world{files: files, commands: commands}, status: Warning, fix: "sudo systemctl enable --now"}, noDaemon},
		{answer{name: "not allowed", status: Info, detail: "only root", fix: "sudo usernet doctor"}, says(Daemon{}, fs.ErrPermission)},
		{answer{name: "silent", status: Warning, detail: "too long"}, says(Daemon{}, context.DeadlineExceeded)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := tt.world.machine()
			m.cfg.Ask = tt.ask
			tt.compare(t, m, (*machine).daemon)
		})
	}
}

// Where systemd listens for a daemon that sleeps, nobody is woken: the daemon's socket is not dialled.
func TestSleepingDaemon(t *testing.T) {
	files, commands := systemd("inactive")
	files["/run/usernet/usernet.sock"] = ""
	m := world{files: files, commands: commands}.machine()
	m.cfg.Ask = func(context.Context, string) (Daemon, error) { t.Error("asked"); return Daemon{}, nil }
	answer{status: OK, detail: "systemd starts it"}.compare(t, m, (*machine).daemon)
	answer{}.compare(t, m, (*machine).leftOvers)
	answer{status: Info, detail: "this is v1"}.compare(t, m, (*machine).version)
}

func TestSystemd(t *testing.T) {
	files, commands := systemd("active")
	change := func(old, new string) world {
		changed := map[string]string{}
		for line, text := range commands {
			changed[line] = strings.Replace(text, old, new, 1)
		}
		return world{files: files, commands: changed}
	}
	for _, a := range []answer{
		{name: "none", status: Info, detail: "does not run this machine"},
		{name: "container", world: world{files: map[string]string{"/usr/bin/systemctl": "#!"}}, status: Info, detail: "does not run this machine"},
		{name: "enabled", world: world{files: files, commands: commands}, status: OK, detail: "starts with the machine"},
		{name: "not installed", world: change("LoadState=loaded", "LoadState=not-found"), status: Info, detail: "not installed"},
		{name: "not enabled", world: change("UnitFileState=enabled", "UnitFileState=disabled"), status: Warning, detail: "not all enabled", fix: "systemctl enable --now usernet.socket"},
		{name: "no socket", world: change("usernet.socket\nLoadState=loaded\nActiveState=active", "usernet.socket\nLoadState=loaded\nActiveState=failed"),
			status: Warning, detail: "not listened at", fix: "systemctl enable --now"},
	} {
		a.check(t, (*machine).systemd)
	}
}
