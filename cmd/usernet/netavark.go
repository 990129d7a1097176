//go:build linux

package main

import (
	"context"
	"os"
	"slices"

	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/driver/netavark"
	"github.com/usernet/usernet/internal/netns"
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

// daemonCommand is the control socket of the daemon that is in charge of the user, and how to start one there. The daemon
// says in its configuration where it listens.
func daemonCommand() control.Daemon {
	cfg, err := readDaemon(configFile())
	if err != nil {
		cfg = daemonDefaults() // the daemon will tell what is wrong with the file
	}
	daemon := control.Daemon{Socket: cfg.ControlSocket, Advice: "systemctl --user enable --now usernet.socket does that for good, usernet serve & until the next start of the machine"}
	if own, err := netns.Own(); err == nil && own && netavark.Rootless() {
		return daemon // what is started here is in Podman's network namespace, which goes with the last container
	}
	if self, err := os.Executable(); err == nil {
		daemon.Serve = []string{self, "serve"}
	}
	return daemon
}
