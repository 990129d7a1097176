package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"strings"
	"syscall"
)

// oldestDocker is the first version whose calls usernet understands.
const oldestDocker = "20.10"

// docker looks for the engine; the command alone is worth a hint.
func (m *machine) docker(ctx context.Context) (finding, bool) {
	_, command := m.find("docker")
	socket, ok := m.dockerSocket()
	if !ok {
		return say(Info, "the engine is not on this machine (DOCKER_HOST); usernet has to run where it is.")
	}
	if m.dockerAsleep(ctx, socket) {
		return say(OK, "systemd starts it when it is called at %s.", socket)
	}
	text, err := request(ctx, socket, http.MethodGet, "/version")
	switch {
	case absent(err) && !command:
		return say(Info, "not installed.")
	case absent(err):
		command := m.sudo("dockerd")
		if m.ask(ctx)["docker.service"].loaded {
			command = m.sudo("systemctl start docker")
		}
		return fix(command, Warning, "the docker command is installed, but no engine answers at %s.", socket)
	case errors.Is(err, fs.ErrPermission):
		return fix("sudo usernet doctor", Info, "there is an engine at %s, but you may not ask it.", socket)
	case err != nil:
		return say(Warning, "the engine at %s does not answer: %v.", socket, plain(err))
	}
	var v struct{ Version string }
	if json.Unmarshal(text, &v) != nil || v.Version == "" {
		return say(Warning, "what answers at %s does not tell a version.", socket)
	}
	if older(v.Version, oldestDocker) {
		return say(Warning, "the engine is %s; usernet works with %s and later.", v.Version, oldestDocker)
	}
	return say(OK, "the engine is %s and answers at %s.", v.Version, socket)
}

// dockerSocket is where the engine is called; ok is false if that is not on this machine.
func (m *machine) dockerSocket() (path string, ok bool) {
	if host := m.getenv("DOCKER_HOST"); host != "" {
		return strings.CutPrefix(host, "unix://")
	}
	if dir := m.getenv("XDG_RUNTIME_DIR"); dir != "" && m.uid != 0 && m.exists(dir+"/docker.sock") {
		return dir + "/docker.sock", true
	}
	return dockersOwn, true
}

// dockersOwn is the socket that Docker's unit docker.socket has.
const dockersOwn = "/var/run/docker.sock"

func (m *machine) dockerAsleep(ctx context.Context, socket string) bool {
	return socket == dockersOwn && m.asleep(ctx, "docker", socket)
}

// dockerDriver asks usernet as Docker does: by the socket that lies where Docker looks for drivers.
func (m *machine) dockerDriver(ctx context.Context) (finding, bool) {
	socket := m.cfg.Daemon.PluginSocket
	if m.usersOwn() {
		if _, ok := m.find("docker"); !ok {
			return silence()
		}
		return fix("sudo usernet doctor", Info, "Docker's networks are in the system's daemon, which root has to look at.")
	}
	if m.asleep(ctx, "usernet", socket) {
		return say(OK, "systemd starts usernet when Docker calls %s.", socket)
	}
	text, err := request(ctx, socket, http.MethodPost, "/Plugin.Activate")
	switch {
	case absent(err):
		if name := m.managedPlugin(ctx); name != "" {
			return say(OK, "a plugin of Docker's own: docker network create -d %s.", name)
		}
		if _, ok := m.find("docker"); !ok {
			return silence()
		}
		return fix(m.sudo("usernet serve"), Warning, "no usernet answers at %s, so Docker does not know the driver.", socket)
	case errors.Is(err, fs.ErrPermission):
		return say(Info, "only root and Docker may look at %s.", socket)
	case err != nil:
		return say(Warning, "usernet at %s does not answer Docker: %v.", socket, plain(err))
	}
	var a struct{ Implements []string }
	if json.Unmarshal(text, &a) != nil || !strings.Contains(strings.Join(a.Implements, " "), "NetworkDriver") {
		return say(Warning, "what answers at %s is no network driver.", socket)
	}
	name := socket[strings.LastIndexByte(socket, '/')+1:]
	return say(OK, "usernet answers Docker: docker network create -d %s.", strings.TrimSuffix(name, ".sock"))
}

// managedPlugin is the name of usernet among the plugins that Docker itself runs; "" if it is none.
func (m *machine) managedPlugin(ctx context.Context) string {
	socket, ok := m.dockerSocket()
	if !ok || m.dockerAsleep(ctx, socket) {
		return ""
	}
	text, err := request(ctx, socket, http.MethodGet, "/plugins")
	if err != nil {
		return ""
	}
	var plugins []struct {
		Name    string
		Enabled bool
	}
	if json.Unmarshal(text, &plugins) != nil {
		return ""
	}
	for _, p := range plugins {
		name, _, _ := strings.Cut(p.Name, ":")
		if p.Enabled && (name == "usernet" || strings.HasSuffix(name, "/usernet")) {
			return p.Name
		}
	}
	return ""
}

// absent tells whether nobody listens at a socket.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// plain is an error for people who do not care that it was HTTP.
func plain(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return errors.New("it takes too long")
	}
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(inner) {
		err = inner
	}
	return err
}

func (m *machine) containerd(ctx context.Context) (finding, bool) {
	const socket = "/run/containerd/containerd.sock"
	path, ok := m.find("containerd")
	if !ok {
		return silence()
	}
	text, err := m.run(ctx, path, "--version")
	if err != nil {
		return say(Warning, "it does not run: %v.", err)
	}
	// containerd github.com/containerd/containerd VERSION COMMIT
	version := firstLine(text)
	if f := strings.Fields(version); len(f) > 2 {
		version = f[2]
	}
	state := "not running"
	if m.exists(socket) {
		state = "with a socket at " + socket
	}
	return say(Info, "%s, %s. usernet serves it through Docker only.", version, state)
}

func (m *machine) cni(context.Context) (finding, bool) {
	var there []string
	for _, dir := range []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni", "/etc/cni/net.d"} {
		if m.exists(dir) {
			there = append(there, dir)
		}
	}
	if len(there) == 0 {
		return silence()
	}
	return say(Info, "plugins and networks of others are in %s. usernet is no CNI plugin.", strings.Join(there, ", "))
}
