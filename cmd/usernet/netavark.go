package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/driver/netavark"
)

// netavark is the program as netavark and Podman call it: by the commands of a network driver plugin. done is false if
// args are none of those.
func (p *program) netavark(ctx context.Context, args []string) (status int, done bool) {
	if len(args) == 0 || !slices.Contains(netavark.Commands, args[0]) {
		return 0, false
	}
	plugin := netavark.Plugin{Version: buildVersion(), Daemon: daemonCommand(), Stdin: p.stdin, Stdout: p.stdout}
	return plugin.Run(ctx, args), true
}

// daemonCommand is the control socket of the daemon that belongs to the user, and how to start one there. The system's
// daemon says in its configuration where it listens. That of an ordinary user cannot be started from where rootless Podman
// runs a plugin: it would be in Podman's namespaces.
func daemonCommand() control.Daemon {
	if os.Geteuid() != 0 || netavark.Rootless() {
		return control.Daemon{Socket: filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "usernet/usernet.sock")}
	}
	daemon := control.Daemon{Socket: config.DefaultDaemon().ControlSocket}
	self, err := os.Executable()
	if err != nil {
		return daemon
	}
	daemon.Serve = []string{self, "serve"}
	text, err := os.ReadFile(defaultConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return daemon
	}
	cfg, err := config.ParseDaemon(text)
	if err != nil {
		return daemon // the daemon will tell what is wrong with the file
	}
	daemon.Socket = filepath.Clean(cfg.ControlSocket)
	return daemon
}
