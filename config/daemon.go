package config

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock"
)

// Daemon is the configuration of usernet serve.
type Daemon struct {
	PluginSocket  string            // where Docker finds the driver; "": nowhere
	ControlSocket string            // where usernet ps and its like find the daemon
	StateDir      string            // what must survive a reboot
	RunDir        string            // what must not
	HostGateway   string            // URL of the gateway on the host of the virtual machine that this is; "": none
	LogLevel      slog.Level        // the least level that is logged
	Defaults      map[string]string // options of every network that does not give them, by their short names; nil: none
}

// DefaultDaemon is the configuration of the system's daemon where the file says nothing.
func DefaultDaemon() Daemon {
	return Daemon{
		PluginSocket:  "/run/docker/plugins/usernet.sock",
		ControlSocket: "/run/usernet/usernet.sock",
		StateDir:      "/var/lib/usernet",
		RunDir:        "/run/usernet",
		LogLevel:      slog.LevelInfo,
	}
}

// UserDaemon is that of an ordinary user's daemon, whose directories for what belongs to a login ($XDG_RUNTIME_DIR) and
// for what lasts ($XDG_STATE_HOME) are given. Docker cannot use it.
func UserDaemon(runtime, state string) Daemon {
	return Daemon{
		ControlSocket: filepath.Join(runtime, "usernet/usernet.sock"),
		StateDir:      filepath.Join(state, "usernet"),
		RunDir:        filepath.Join(runtime, "usernet"),
		LogLevel:      slog.LevelInfo,
	}
}

// daemonFile is the daemon's file as TOML has it.
type daemonFile struct {
	PluginSocket  *string        `toml:"plugin_socket"`
	ControlSocket *string        `toml:"control_socket"`
	StateDir      *string        `toml:"state_dir"`
	RunDir        *string        `toml:"run_dir"`
	HostGateway   *string        `toml:"host_gateway"`
	LogLevel      *string        `toml:"log_level"`
	Defaults      map[string]any `toml:"defaults"`
}

// ParseDaemon reads the daemon's file, TOML (toml.io, version 1.0). What it does not give is as in base; what is not known
// in it is an error. Errors name the line where that is known.
func ParseDaemon(text []byte, base Daemon) (Daemon, error) {
	var f daemonFile
	meta, err := toml.Decode(string(text), &f)
	var syntax toml.ParseError
	if errors.As(err, &syntax) {
		return Daemon{}, invalid("configuration, line %d: %s", syntax.Position.Line, syntax.Message)
	}
	if err != nil {
		return Daemon{}, invalid("configuration: %w", err)
	}
	for _, key := range meta.Undecoded() {
		return Daemon{}, invalid("configuration%s: unknown setting %s", lineOf(text, key), key)
	}
	d := base
	if err := paths(text, f, &d); err != nil {
		return Daemon{}, err
	}
	if f.HostGateway != nil {
		if d.HostGateway, err = hostGateway(*f.HostGateway); err != nil {
			return Daemon{}, invalid("configuration%s: host_gateway: %w", lineOf(text, toml.Key{"host_gateway"}), err)
		}
	}
	if f.LogLevel != nil {
		if err := d.LogLevel.UnmarshalText([]byte(*f.LogLevel)); err != nil {
			at := lineOf(text, toml.Key{"log_level"})
			return Daemon{}, invalid("configuration%s: log_level = %.64q: want debug, info, warn or error", at, *f.LogLevel)
		}
	}
	if d.Defaults, err = defaults(f.Defaults); err != nil {
		return Daemon{}, fmt.Errorf("configuration, [defaults]: %w", err)
	}
	return d, nil
}

// hostGateway checks the URL of a gateway; "" is none.
func hostGateway(url string) (string, error) {
	if url == "" {
		return "", nil
	}
	a, err := vsock.Parse(url)
	if err != nil {
		return "", err
	}
	return a.String(), nil
}

// paths puts the paths that the file gives into d.
func paths(text []byte, f daemonFile, d *Daemon) error {
	for _, p := range []struct {
		name     string
		from, to *string
	}{
		{"plugin_socket", f.PluginSocket, &d.PluginSocket},
		{"control_socket", f.ControlSocket, &d.ControlSocket},
		{"state_dir", f.StateDir, &d.StateDir},
		{"run_dir", f.RunDir, &d.RunDir},
	} {
		if p.from == nil {
			continue
		}
		if !filepath.IsAbs(*p.from) || strings.ContainsRune(*p.from, 0) {
			at := lineOf(text, toml.Key{p.name})
			return invalid("configuration%s: %s = %.64q: want an absolute path", at, p.name, *p.from)
		}
		*p.to = filepath.Clean(*p.from)
	}
	return nil
}

// defaults checks the default options of networks and returns them by their short names.
func defaults(table map[string]any) (map[string]string, error) {
	if len(table) == 0 {
		return nil, nil
	}
	raw := make(map[string]string)
	for key, value := range table {
		switch v := value.(type) {
		case string:
			raw[key] = v
		case int64, bool:
			raw[key] = fmt.Sprint(v)
		default:
			return nil, invalid("option %s: want text, a number or true or false", key)
		}
	}
	values, err := canonical(raw)
	if err != nil {
		return nil, err
	}
	var scratch usernet.Options
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if options[name].single {
			return nil, invalid("option %s: it is for one network, not for all", name)
		}
		if err := options[name].set(&scratch, values[name]); err != nil {
			return nil, invalid("option %s=%.64s: %w", name, values[name], err)
		}
	}
	return values, nil
}

// lineOf finds the line that begins with the last part of key, for errors that the TOML decoder gives without one.
// It is "" when there is none or more than one.
func lineOf(text []byte, key toml.Key) string {
	found := ""
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		name, _, _ := strings.Cut(line, "=")
		name = strings.Trim(strings.TrimSpace(name), `"'[]`)
		if name != key[len(key)-1] && name != key.String() {
			continue
		}
		if found != "" {
			return ""
		}
		found = fmt.Sprintf(", line %d", n)
	}
	return found
}
