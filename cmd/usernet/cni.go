//go:build linux

package main

import (
	"context"

	"github.com/usernet/usernet/driver/cni"
)

// cni is the program as container runtimes call it: a CNI plugin, which is told everything by its environment. done is false
// if it was called otherwise.
func (p *program) cni(ctx context.Context, args []string) (status int, done bool) {
	if len(args) > 0 || !cni.Called() {
		return 0, false
	}
	plugin := cni.Plugin{Daemon: daemonCommand()}
	return plugin.Run(ctx), true
}
