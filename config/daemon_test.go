package config

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
)

func TestParseDaemon(t *testing.T) {
	got, err := ParseDaemon([]byte(`
plugin_socket = "/a/b.sock"
control_socket = "/c//d.sock"
state_dir = "/var/x"
run_dir = "/run/x"
host_gateway = "vsock://host:1024"
log_level = "WARN"
[defaults]
mtu = 1400
"com.docker.network.bridge.enable_icc" = false
host_binding = "127.0.0.1"
`), DefaultDaemon())
	if err != nil {
		t.Fatal(err)
	}
	want := Daemon{
		PluginSocket: "/a/b.sock", ControlSocket: "/c/d.sock", StateDir: "/var/x", RunDir: "/run/x", HostGateway: "vsock://2:1024", LogLevel: slog.LevelWarn,
		Defaults: map[string]string{"mtu": "1400", "icc": "false", "host_binding": "127.0.0.1"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestUserDaemon(t *testing.T) {
	got, err := ParseDaemon([]byte("run_dir = \"/elsewhere\"\n"), UserDaemon("/run/user/1000", "/home/ann/.local/state"))
	if err != nil {
		t.Fatal(err)
	}
	want := Daemon{ControlSocket: "/run/user/1000/usernet/usernet.sock", StateDir: "/home/ann/.local/state/usernet", RunDir: "/elsewhere"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestParseDaemonRefused(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"syntax", "state_dir = \"/a\"\nrun_dir = /b\n", "invalid configuration, line 2: "},
		{"type", "\nstate_dir = 5\n", "invalid configuration: toml: line 2 "},
		{"twice", "state_dir = \"/a\"\nstate_dir = \"/b\"\n", "invalid configuration, line 2: "},
		{"unknown", "log_level = \"info\"\n\nstate_dri = \"/a\"\n", "invalid configuration, line 3: unknown setting state_dri"},
		{"unknown table", "[network]\nmtu = 1\n", "invalid configuration, line 1: unknown setting network"},
		{"relative", "run_dir = \"run\"\n", `invalid configuration, line 1: run_dir = "run": want an absolute path`},
		{"gateway", "\nhost_gateway = \"vsock:2\"\n", `invalid configuration, line 2: host_gateway: address "vsock:2": want `},
		{"level", "log_level = \"loud\"\n", `invalid configuration, line 1: log_level = "loud": want debug, info, warn or error`},
		{"default unknown", "[defaults]\nmut = 1400\n", `configuration, [defaults]: invalid option "mut": unknown; did you mean mtu?`},
		{"default value", "[defaults]\nmtu = 3\n", "configuration, [defaults]: invalid option mtu=3: want a number"},
		{"default list", "[defaults]\nmtu = [1]\n", "configuration, [defaults]: invalid option mtu: want text, a number or true or false"},
		{"default for one network", "[defaults]\nsubnet = \"10.0.0.0/24\"\n", "configuration, [defaults]: invalid option subnet: it is for one network, not for all"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseDaemon([]byte(tt.text), DefaultDaemon())
			if !errors.Is(err, usernet.ErrInvalid) || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("error\nwant %s…\n got %v", tt.want, err)
			}
		})
	}
}

// The reference file shows every setting with its default, commented out.
func TestReferenceFile(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "dist", "usernet.conf"))
	if err != nil {
		t.Fatal(err)
	}
	asIs, err := ParseDaemon(text, DefaultDaemon())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(DefaultDaemon(), asIs); diff != "" {
		t.Errorf("as it is: -want +got\n%s", diff)
	}

	var b strings.Builder
	for line := range strings.Lines(string(text)) {
		if setting, ok := strings.CutPrefix(line, "#"); ok && !strings.HasPrefix(setting, " ") {
			line = setting
		}
		b.WriteString(line)
	}
	all, err := ParseDaemon([]byte(b.String()), DefaultDaemon())
	if err != nil {
		t.Fatal(err)
	}
	got, err := OptionsOver(all.Defaults, map[string]string{"mode": "bridge"})
	if err != nil {
		t.Fatal(err)
	}
	none, err := Options(map[string]string{"mode": "bridge"})
	if err != nil {
		t.Fatal(err)
	}
	none.MTU, none.IfacePrefix = usernet.Network{}.MTU(), "eth"
	if diff := cmp.Diff(none, got, cmpValues); diff != "" {
		t.Errorf("default options: -want +got\n%s", diff)
	}
	if all.Defaults["mode"] != string(base(nil).Mode) {
		t.Errorf("default mode %q", all.Defaults["mode"])
	}
	all.Defaults = nil
	if diff := cmp.Diff(DefaultDaemon(), all); diff != "" {
		t.Errorf("with every setting: -want +got\n%s", diff)
	}

	file := reflect.TypeFor[daemonFile]()
	for i := range file.NumField() {
		if name := file.Field(i).Tag.Get("toml"); !strings.Contains(b.String(), "\n"+name+" = ") && !strings.Contains(b.String(), "\n["+name+"]\n") {
			t.Errorf("setting %s is not in the file", name)
		}
	}
	for _, name := range Names() {
		if !options[name].single && !strings.Contains(b.String(), name+" = ") {
			t.Errorf("option %s is not in the file", name)
		}
	}
}

func FuzzParseDaemon(f *testing.F) {
	f.Add([]byte("log_level = \"info\"\n[defaults]\nmtu = 1500\n"))
	f.Add([]byte("[defaults]\nmode = \"bridge\"\nmtu = 3\n"))
	f.Add([]byte("a.b.c = [{x=1}]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := ParseDaemon(text, DefaultDaemon())
		if err != nil {
			if !errors.Is(err, usernet.ErrInvalid) {
				t.Fatalf("%v does not wrap ErrInvalid", err)
			}
			return
		}
		for _, path := range []string{d.PluginSocket, d.ControlSocket, d.StateDir, d.RunDir} {
			if !filepath.IsAbs(path) {
				t.Errorf("path %q", path)
			}
		}
		// Defaults that the file may give must not stop a network from being created, of either kind.
		for _, mode := range []string{"usermode", "bridge"} {
			if _, err := OptionsOver(d.Defaults, map[string]string{"mode": mode}); err != nil {
				t.Errorf("mode %s: %v", mode, err)
			}
		}
	})
}
