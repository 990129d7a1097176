// Package engine runs real Docker engines for the tests and the demo, each in a pretend host of its own: a network,
// mount and process namespace with an uplink to a pretend internet. Nothing of it touches the machine's own network,
// its Docker or its firewall, and all of it goes when the process that made it ends, however it ends.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Kind says which Docker to run.
type Kind struct {
	Name string
	root string   // the root directory it lives in; "" is the machine's own
	cmd  []string // docker compose, as this one wants to be called
}

// Docker20 is Docker 20.10, the one that Debian 12 ships, in the machine's own root.
func Docker20() Kind { return Kind{Name: "docker20", cmd: []string{"docker-compose"}} }

// Docker28 is Docker 28 from Debian unstable, in the root that test/setup.sh made.
func Docker28() Kind {
	return Kind{Name: "docker28", root: filepath.Join(cacheDir(), "sid"), cmd: []string{"docker", "compose"}}
}

func cacheDir() string {
	if d := os.Getenv("USERNET_TEST_CACHE"); d != "" {
		return d
	}
	return "/var/cache/usernet-test"
}

// Missing says what the machine lacks to run the engine, or nil.
func (k Kind) Missing() error {
	for _, f := range []string{"/usr/sbin/dockerd", "/usr/bin/docker"} {
		if _, err := os.Stat(filepath.Join("/", k.root, f)); err != nil {
			return fmt.Errorf("%s (test/setup.sh installs it): %w", k.Name, err)
		}
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s: needs root", k.Name)
	}
	return nil
}

// Paths inside the pretend host.
const (
	DockerSocket  = "/run/docker.sock"
	PluginSocket  = "/run/docker/plugins/usernet.sock"
	ControlSocket = "/run/usernet/usernet.sock"
	RunDir        = "/run/usernet"
)

// startTimeout bounds the start and the stop of a daemon.
const startTimeout = 60 * time.Second

// Engine is a pretend host with a Docker engine and, once StartUsernet was called, usernet in it. Its methods are for
// one goroutine at a time, except Docker, Compose and what comes with Host.
type Engine struct {
	*Host
	Kind Kind

	dockerd *process
}

// New makes a pretend host, starts Docker in it with flags beyond the usual ones, and loads the test image. The caller
// closes the engine.
func New(ctx context.Context, kind Kind, flags ...string) (_ *Engine, err error) {
	if err := kind.Missing(); err != nil {
		return nil, err
	}
	host, err := newHost(kind.root)
	if err != nil {
		return nil, fmt.Errorf("%s: make the pretend host: %w", kind.Name, err)
	}
	e := &Engine{Host: host, Kind: kind}
	defer func() {
		if err != nil {
			e.Close()
		}
	}()
	if err := e.StartDaemon(ctx, flags...); err != nil {
		return nil, err
	}
	if err := e.loadImage(ctx); err != nil {
		return nil, fmt.Errorf("%s: load the test image: %w", kind.Name, err)
	}
	return e, nil
}

// Close ends everything in the pretend host and removes what it left.
func (e *Engine) Close() error { return e.Host.Close() }

// StartDaemon starts dockerd with flags beyond the usual ones and waits until it answers.
func (e *Engine) StartDaemon(ctx context.Context, flags ...string) error {
	args := []string{
		"--config-file", "/run/daemon.json",
		"--data-root", filepath.Join(e.Dir, "docker"),
		"--exec-root", "/run/docker",
		"--pidfile", "/run/docker.pid",
		"--cgroup-parent", "/" + e.cgroup,
		"--exec-opt", "native.cgroupdriver=cgroupfs",
		"-H", "unix://" + DockerSocket,
	}
	p, err := e.spawn("dockerd", append(args, flags...)...)
	if err != nil {
		return err
	}
	e.dockerd = p
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return p.ready(ctx, func(ctx context.Context) error { return e.ping(ctx) })
}

func (e *Engine) ping(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
	if err != nil {
		return err
	}
	tr := &http.Transport{DialContext: e.DialUnix(DockerSocket), DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return fmt.Errorf("ping: %s: %s", resp.Status, b)
	}
	return nil
}

// StopDaemon stops dockerd as a service manager does.
func (e *Engine) StopDaemon() error { return e.dockerd.stop(syscall.SIGTERM) }

// KillDaemon ends dockerd with SIGKILL; its containers live on.
func (e *Engine) KillDaemon() error { return e.dockerd.stop(syscall.SIGKILL) }

// RestartDaemon stops dockerd and starts it with flags.
func (e *Engine) RestartDaemon(ctx context.Context, flags ...string) error {
	if err := e.StopDaemon(); err != nil {
		return err
	}
	return e.StartDaemon(ctx, flags...)
}

// Revive starts again what of Docker and usernet has been started before and does not run.
func (e *Engine) Revive(ctx context.Context) error {
	var errs []error
	if e.dockerd.ended() {
		errs = append(errs, e.StartDaemon(ctx))
	}
	if e.usernet != nil && e.usernet.ended() {
		errs = append(errs, e.StartUsernet(ctx))
	}
	return errors.Join(errs...)
}

// Docker runs the engine's own docker command and returns its standard output without the last newline.
func (e *Engine) Docker(ctx context.Context, args ...string) (string, error) {
	return e.command(ctx, "", "docker", args...)
}

// Compose runs the engine's docker compose on the given compose file.
func (e *Engine) Compose(ctx context.Context, file string, args ...string) (string, error) {
	name := e.Kind.cmd[0]
	args = append(append(e.Kind.cmd[1:len(e.Kind.cmd):len(e.Kind.cmd)], "-f", "-", "-p", "web"), args...)
	return e.command(ctx, file, name, args...)
}
