package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver/netavark"
)

// netavark is the program as netavark and Podman call it: by the commands of a network driver plugin. done is false if
// args are none of those.
func (p *program) netavark(ctx context.Context, args []string) (status int, done bool) {
	if len(args) == 0 || !slices.Contains(netavark.Commands, args[0]) {
		return 0, false
	}
	socket, serve := daemonCommand()
	plugin := netavark.Plugin{Version: buildVersion(), Socket: socket, Serve: serve, Stdin: p.stdin, Stdout: p.stdout}
	return plugin.Run(ctx, args), true
}

// daemonCommand is the control socket of the daemon that belongs to the user, and how to start one there. The system's
// daemon says in its configuration where it listens. That of an ordinary user cannot be started from where rootless Podman
// runs a plugin: it would be in Podman's namespaces.
func daemonCommand() (socket string, serve []string) {
	if os.Geteuid() != 0 || netavark.Rootless() {
		return filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "usernet/usernet.sock"), nil
	}
	self, err := os.Executable()
	if err != nil {
		return config.DefaultDaemon().ControlSocket, nil
	}
	serve = []string{self, "serve"}
	text, err := os.ReadFile(defaultConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return config.DefaultDaemon().ControlSocket, serve
	}
	cfg, err := config.ParseDaemon(text)
	if err != nil {
		return config.DefaultDaemon().ControlSocket, serve // the daemon will tell what is wrong with the file
	}
	return filepath.Clean(cfg.ControlSocket), serve
}
