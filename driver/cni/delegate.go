package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// ipam is the plugin that chooses addresses; "" is none: the daemon does.
func (w wire) ipam() string {
	var ipam types.IPAM
	if json.Unmarshal(w.IPAM, &ipam) != nil {
		return ""
	}
	return ipam.Type
}

// delegate gives the IPAM plugin, if there is one, a command of the specification, with the environment and the
// configuration that we were given, and returns what it prints. (Specification, section 4: Plugin Delegation.)
func (w wire) delegate(ctx context.Context, command string, text []byte) ([]byte, error) {
	name := w.ipam()
	if name == "" {
		return nil, nil
	}
	path, err := pluginPath(name)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(text), &out, &errs
	if err := cmd.Run(); err != nil {
		var told types.Error
		if json.Unmarshal(out.Bytes(), &told) == nil && told.Msg != "" {
			return nil, types.NewError(told.Code, fmt.Sprintf("ipam %s: %s", name, told.Msg), told.Details)
		}
		return nil, fmt.Errorf("ipam %s: %w: %s", name, err, strings.TrimSpace(errs.String()))
	}
	return out.Bytes(), nil
}

// pluginPath finds a plugin where the runtime says that they are.
func pluginPath(name string) (string, error) {
	dirs := os.Getenv("CNI_PATH")
	if name != filepath.Base(name) {
		return "", invalid("ipam %.64q: want the name of a plugin", name)
	}
	for _, dir := range filepath.SplitList(dirs) {
		path := filepath.Join(dir, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", invalid("ipam %.64s: there is no such plugin in %s", name, dirs)
}

// lease asks the IPAM plugin for addresses; nil: there is no such plugin.
func (w wire) lease(ctx context.Context, text []byte) (*types100.Result, error) {
	if w.ipam() == "" {
		return nil, nil
	}
	out, err := w.delegate(ctx, "ADD", text)
	if err != nil {
		w.release(ctx, text) // of what a failed ADD may have left; that it failed is what matters
		return nil, err
	}
	var result types.Result
	if err = whole(out); err == nil {
		result, err = create.CreateFromBytes(out)
	}
	if err != nil {
		return nil, fmt.Errorf("ipam %s: read its result: %w", w.ipam(), errors.Join(err, w.release(ctx, text)))
	}
	return types100.NewResultFromResult(result)
}

// release gives the addresses of a container back.
func (w wire) release(ctx context.Context, text []byte) error {
	_, err := w.delegate(context.WithoutCancel(ctx), "DEL", text)
	return err
}
