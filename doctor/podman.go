package doctor

import (
	"context"
	"encoding/json"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// The first versions that call network drivers of others.
const (
	oldestPodman   = "4.5"
	oldestNetavark = "1.6"
)

func (m *machine) podman(ctx context.Context) (finding, bool) {
	program, ok := m.find("podman")
	if !ok {
		return say(Info, "not installed.")
	}
	version, err := m.versionOf(ctx, program)
	switch {
	case err != nil:
		return say(Warning, "it does not run: %v.", err)
	case older(version, oldestPodman):
		return say(Warning, "%s; usernet works with %s and later.", version, oldestPodman)
	}
	return say(OK, "%s.", version)
}

func (m *machine) netavark(ctx context.Context) (finding, bool) {
	if _, ok := m.find("podman"); !ok {
		return silence()
	}
	// Podman's default helper_binaries_dir, and then the path.
	var program string
	for _, dir := range []string{"/usr/local/libexec/podman", "/usr/local/lib/podman", "/usr/libexec/podman", "/usr/lib/podman"} {
		if p := path.Join(dir, "netavark"); program == "" && m.executable(p) {
			program = p
		}
	}
	if program == "" {
		program, _ = m.find("netavark")
	}
	if program == "" {
		return fix(m.install("netavark"), Warning, "not installed: Podman needs it for networks of usernet.")
	}
	version, err := m.versionOf(ctx, program)
	switch {
	case err != nil:
		return say(Warning, "%s does not run: %v.", program, err)
	case older(version, oldestNetavark):
		return say(Warning, "%s; it can use drivers of others from %s.", version, oldestNetavark)
	}
	return say(OK, "%s, which calls usernet for Podman.", version)
}

// versionOf asks a program that answers NAME VERSION or NAME version VERSION.
func (m *machine) versionOf(ctx context.Context, program string) (string, error) {
	text, err := m.run(ctx, program, "--version")
	if err != nil {
		return "", err
	}
	f := strings.Fields(firstLine(text))
	if len(f) == 0 {
		return "", nil
	}
	return f[len(f)-1], nil
}

// driverDirs is where netavark looks for drivers unless containers.conf says otherwise.
var driverDirs = []string{
	"/usr/local/libexec/netavark", "/usr/libexec/netavark", "/usr/local/lib/netavark", "/usr/lib/netavark",
}

// podmanDriver looks for usernet where netavark does.
func (m *machine) podmanDriver(ctx context.Context) (finding, bool) {
	if _, ok := m.find("podman"); !ok {
		return silence()
	}
	dirs, err := m.pluginDirs()
	if err != nil {
		return say(Warning, "Podman's settings cannot be read: %v.", err)
	}
	if len(dirs) == 0 {
		return say(Warning, "netavark_plugin_dirs in containers.conf is empty, so Podman knows no drivers of others.")
	}
	for _, dir := range dirs {
		program := path.Join(dir, "usernet")
		if !m.executable(program) {
			continue
		}
		return m.driverVersion(ctx, program)
	}
	return fix(m.copyTo(dirs[0]), Warning, "usernet is in none of the directories where Podman looks for drivers, the first being %s.", dirs[0])
}

// copyTo is the command that makes this program a driver.
func (m *machine) copyTo(dir string) string {
	command := "install -D " + m.self + " " + dir + "/usernet"
	if home := m.getenv("HOME"); home != "" && strings.HasPrefix(dir, home+"/") {
		return command
	}
	return m.sudo(command)
}

// driverVersion compares the driver that Podman would call with this program.
func (m *machine) driverVersion(ctx context.Context, program string) (finding, bool) {
	text, err := m.run(ctx, program, "info")
	var info struct{ Version string }
	if err == nil {
		err = json.Unmarshal([]byte(text), &info)
	}
	switch {
	case err != nil:
		return fix(m.copyTo(path.Dir(program)), Warning, "%s is there, but does not answer as a driver: %v.", program, err)
	case info.Version != m.cfg.Version:
		return fix(m.copyTo(path.Dir(program)), Warning, "%s is version %s, this is %s.", program, info.Version, m.cfg.Version)
	}
	return say(OK, "%s: podman network create --driver usernet.", program)
}

// pluginDirs is netavark_plugin_dirs of containers.conf(5): each file goes over those before it.
func (m *machine) pluginDirs() ([]string, error) {
	dirs := driverDirs
	for _, file := range m.containersConf() {
		text, err := m.read(file)
		if err != nil {
			continue // containers.conf is optional everywhere
		}
		var conf struct {
			Network struct {
				Dirs []any `toml:"netavark_plugin_dirs"`
			} `toml:"network"`
		}
		meta, err := toml.Decode(text, &conf)
		if err != nil {
			return nil, &fs.PathError{Op: "parse", Path: file, Err: err}
		}
		if meta.IsDefined("network", "netavark_plugin_dirs") {
			dirs = merge(dirs, conf.Network.Dirs)
		}
	}
	return dirs, nil
}

// merge is a list of containers.conf over an earlier one: it replaces it, unless it has the table {append=true}.
func merge(old []string, list []any) []string {
	var dirs []string
	keep := false
	for _, item := range list {
		switch v := item.(type) {
		case string:
			dirs = append(dirs, v)
		case map[string]any:
			if on, ok := v["append"].(bool); ok {
				keep = on
			}
		}
	}
	if keep {
		return append(slices.Clone(old), dirs...)
	}
	return dirs
}

// containersConf lists the files that containers.conf is made of, the strongest last.
func (m *machine) containersConf() []string {
	if one := m.getenv("CONTAINERS_CONF"); one != "" {
		return []string{one}
	}
	files := []string{"/usr/share/containers/containers.conf", "/etc/containers/containers.conf"}
	files = append(files, m.dropIns("/etc/containers/containers.conf.d")...)
	home := m.getenv("XDG_CONFIG_HOME")
	if home == "" && m.getenv("HOME") != "" {
		home = m.getenv("HOME") + "/.config"
	}
	if m.uid != 0 && home != "" {
		files = append(files, home+"/containers/containers.conf")
		files = append(files, m.dropIns(home+"/containers/containers.conf.d")...)
	}
	return files
}

func (m *machine) dropIns(dir string) []string {
	names, err := fs.Glob(m.root, rel(dir)+"/*.conf")
	if err != nil {
		return nil
	}
	for i, name := range names {
		names[i] = "/" + name
	}
	return names // in order
}
