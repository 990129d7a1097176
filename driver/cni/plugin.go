// Package cni is the door for runtimes that speak CNI (Container Network Interface specification, 0.3.1 to 1.1.0): Kubernetes'
// containerd and CRI-O, nerdctl, Podman up to 5. Each command is a process of its own, with the network's configuration on
// its standard input; this package turns it into a call of the daemon. Nothing is kept here between two calls.
//
// A network is known by its name, for CNI has no other identity for it, and an endpoint by network, container and interface.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/driver/control"
)

// Versions are the versions of the specification that the plugin speaks.
var Versions = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// maxInput bounds what is read, in bytes: all ports of a host, one by one, are less.
const maxInput = 16 << 20

// Called tells whether a runtime has started this process as a plugin.
func Called() bool { return os.Getenv("CNI_COMMAND") != "" }

// Plugin is one run of the plugin.
type Plugin struct {
	Daemon control.Daemon
}

// Run does what the environment and standard input say, and returns the exit status. The answer, or what went wrong, is on
// standard output.
func (p *Plugin) Run(ctx context.Context) int {
	text, failure := input()
	if failure == nil {
		failure = skel.PluginMainFuncsWithError(skel.CNIFuncs{
			Add: func(a *skel.CmdArgs) error {
				result, err := p.add(ctx, a)
				if err != nil {
					return coded(err)
				}
				return types.PrintResult(result, versionOf(text))
			},
			Del:    func(a *skel.CmdArgs) error { return coded(p.del(ctx, a)) },
			Check:  func(a *skel.CmdArgs) error { return coded(p.check(ctx, a)) },
			GC:     func(a *skel.CmdArgs) error { return coded(p.collect(ctx, a)) },
			Status: func(a *skel.CmdArgs) error { return coded(p.status(ctx, a)) },
		}, version.PluginSupports(Versions...), "")
	}
	if failure == nil {
		return 0
	}
	// skel's own way to print an error leaves out the version, which the specification wants.
	json.NewEncoder(os.Stdout).Encode(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{versionOf(text), failure})
	return 1
}

// input reads standard input, within bounds, and puts what was read back there for skel, which knows none. VERSION has no
// input that matters.
func input() ([]byte, *types.Error) {
	if os.Getenv("CNI_COMMAND") == "VERSION" {
		return nil, nil
	}
	text, err := io.ReadAll(io.LimitReader(os.Stdin, maxInput+1))
	if err == nil && len(text) > maxInput {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("the network's configuration has more than %d bytes", maxInput), "")
	}
	if err == nil {
		os.Stdin, err = file(text)
	}
	if err != nil {
		return nil, types.NewError(types.ErrIOFailure, fmt.Sprintf("read the network's configuration: %v", err), "")
	}
	return text, nil
}

// file is a file in memory with text in it.
func file(text []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("configuration", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "configuration")
	if _, err := f.Write(text); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, err
}

// versionOf is the version of the specification that a configuration asks for, or the newest if it has no such thing.
func versionOf(text []byte) string {
	var c struct {
		CNIVersion string `json:"cniVersion"`
	}
	if json.Unmarshal(text, &c) != nil || c.CNIVersion == "" {
		return Versions[len(Versions)-1]
	}
	return c.CNIVersion
}
