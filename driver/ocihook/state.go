package ocihook

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/usernet/usernet"
)

// The bounds of what is read, in bytes. A state is an ID, a path and annotations; a bundle's configuration lists mounts
// and system calls beside.
const (
	maxState  = 1 << 20
	maxBundle = 16 << 20
)

// state is what a runtime tells a hook on its standard input (OCI runtime specification, runtime.md, State). Runtimes
// from before the specification 1.0 call the bundle by another name and tell no status.
type state struct {
	specs.State
	OldBundle string `json:"bundlePath"`
}

// paused is a status of runc's own.
const paused = "paused"

// decodeState reads one state and nothing behind it.
func decodeState(r io.Reader) (state, error) {
	var s state
	text, err := io.ReadAll(io.LimitReader(r, maxState+1))
	if err != nil {
		return s, fmt.Errorf("read the container's state: %w", err)
	}
	switch {
	case len(text) > maxState:
		return s, invalid("container's state: more than %d bytes", maxState)
	case len(strings.TrimSpace(string(text))) == 0:
		return s, invalid("container's state: there is none on standard input; runtimes call this command as a hook")
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, invalid("container's state: %w", err)
	}
	if s.Bundle == "" {
		s.Bundle = s.OldBundle
	}
	return s, s.check()
}

func (s state) check() error {
	switch {
	case s.ID == "":
		return invalid("container's state: it has no id")
	case len(s.ID) > 1024 || strings.ContainsRune(s.ID, 0) || strings.ContainsRune(s.Bundle, 0):
		return invalid("container's state: id %.64q", s.ID)
	case s.Bundle != "" && !filepath.IsAbs(s.Bundle):
		return invalid("container's state: bundle %.64q: want an absolute path", s.Bundle)
	case s.Pid < 0:
		return invalid("container's state: pid %d", s.Pid)
	}
	switch s.Status {
	case "", paused, specs.StateCreating, specs.StateCreated, specs.StateRunning, specs.StateStopped:
	default:
		return invalid("container's state: status %.64q: want creating, created, running or stopped", s.Status)
	}
	if !s.ended() && s.Pid == 0 {
		return invalid("container's state: it is %s and has no pid", s.Status)
	}
	return nil
}

// ended tells whether the container is over.
func (s state) ended() bool {
	return s.Status == specs.StateStopped || s.Status == "" && s.Pid == 0
}

// starting tells whether the container's process has not left the runtime's root directory yet.
func (s state) starting() bool {
	return s.Status == specs.StateCreating || s.Status == specs.StateCreated
}

// bundle is what we want to know of a bundle's configuration (config.json).
type bundle struct {
	Root struct {
		Path string `json:"path"`
	} `json:"root"`
	Hostname string `json:"hostname"`
	Mounts   []struct {
		Destination string `json:"destination"`
		Source      string `json:"source"`
	} `json:"mounts"`
	Linux struct {
		Namespaces []struct {
			Type specs.LinuxNamespaceType `json:"type"`
			Path string                   `json:"path"`
		} `json:"namespaces"`
	} `json:"linux"`
}

// bundle reads the configuration of the container's bundle.
func (s state) bundle() (bundle, error) {
	var b bundle
	if s.Bundle == "" {
		return b, invalid("container's state: it has no bundle")
	}
	f, err := os.Open(filepath.Join(s.Bundle, "config.json"))
	if err != nil {
		return b, fmt.Errorf("open the bundle's configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxBundle+1))
	if err != nil {
		return b, fmt.Errorf("read the bundle's configuration: %w", err)
	}
	if len(text) > maxBundle {
		return b, invalid("%s: more than %d bytes", f.Name(), maxBundle)
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return b, invalid("%s: %w", f.Name(), err)
	}
	return b, nil
}

// rootfs is the path of the container's root directory; "" if the bundle has none.
func (s state) rootfs(b bundle) string {
	if b.Root.Path == "" || filepath.IsAbs(b.Root.Path) {
		return b.Root.Path
	}
	return filepath.Join(s.Bundle, b.Root.Path)
}

// joined is the path of the network namespace that the container joins; "" if it gets one of its own.
func (b bundle) joined() string {
	for _, ns := range b.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path
		}
	}
	return ""
}

// namespace opens the container's network namespace.
func (s state) namespace() (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", s.Pid))
	if err != nil {
		return nil, fmt.Errorf("open the network namespace of container %.64s: %w", s.ID, err)
	}
	same, err := ours(f)
	if err == nil && same {
		err = invalid("container %.64s: the hook runs in its network namespace; want the stage createRuntime or prestart, and a network namespace in config.json", s.ID)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// ours tells whether a network namespace is the one that this process is in.
func ours(ns *os.File) (bool, error) {
	a, err := ns.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Stat("/proc/self/ns/net")
	if err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w "+format, append([]any{usernet.ErrInvalid}, args...)...)
}
