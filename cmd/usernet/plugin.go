//go:build linux

package main

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// pluginRunDir is the run directory of a managed plugin: below the mount that Docker propagates to the host (propagatedMount
// in plugin.json), so that the namespaces that are pinned in it outlive the plugin's mount namespace.
const pluginRunDir = "/var/lib/usernet/run"

// plugin is serve in the surroundings of a managed Docker plugin.
func (p *program) plugin(ctx context.Context, c command, args []string) error {
	// Docker mounts /proc/sys read-only there, which plugin.json cannot change; the fabrics and bridges have settings
	// to be made. This is the plugin's own mount. On a host, where it is none, it fails.
	const flags = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", "/proc/sys", "", flags, ""); err != nil {
		return fmt.Errorf("make /proc/sys writable (this command is for managed Docker plugins, see plugin.json): %w", err)
	}
	return p.serve(ctx, c, append([]string{"--run-dir", pluginRunDir}, args...))
}
