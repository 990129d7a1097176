//go:build linux

package main

import (
	"strings"
	"testing"

	"github.com/usernet/usernet/config"
)

func TestWhoseDaemon(t *testing.T) {
	for _, name := range []string{inUserNamespace, "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", "/home/ann")
	check := func(file, socket, state string) {
		t.Helper()
		if got := configFile(); got != file {
			t.Errorf("configuration file %s, want %s", got, file)
		}
		if got := daemonDefaults(); got.ControlSocket != socket || got.StateDir != state {
			t.Errorf("socket %s and state %s, want %s and %s", got.ControlSocket, got.StateDir, socket, state)
		}
	}
	system := config.DefaultDaemon()
	check("/etc/usernet/usernet.conf", system.ControlSocket, system.StateDir)
	t.Setenv(inUserNamespace, "done")
	check("/home/ann/.config/usernet/usernet.conf", "/run/user/0/usernet/usernet.sock", "/home/ann/.local/state/usernet")
	t.Setenv("XDG_RUNTIME_DIR", "/tmp/run")
	t.Setenv("XDG_STATE_HOME", "relative") // which the specification forbids
	t.Setenv("XDG_CONFIG_HOME", "/tmp/config")
	check("/tmp/config/usernet/usernet.conf", "/tmp/run/usernet/usernet.sock", "/home/ann/.local/state/usernet")
}

// Podman's own network namespace belongs to its user namespace, as the test's belongs to the test's.
func TestServeInPodmansNetwork(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	t.Setenv(inUserNamespace, "done")
	code, _, stderr := runProgram(t, t.Context(), "serve")
	if code != 1 || !strings.Contains(stderr, "this is Podman's network namespace") {
		t.Errorf("exit status %d, %s", code, stderr)
	}
	if d := daemonCommand(); len(d.Serve) != 0 || !strings.Contains(d.Advice, "usernet serve") {
		t.Errorf("a daemon would be started there: %q", d.Serve)
	}
}
