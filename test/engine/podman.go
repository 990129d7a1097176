package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// PodmanKind says which Podman to run.
type PodmanKind struct {
	Name string
	root string
}

// Podman54 is Podman 5.4 with netavark 1.14, from Debian 13, in the root that test/setup.sh made.
func Podman54() PodmanKind { return PodmanKind{"podman54", filepath.Join(cacheDir(), "podman54")} }

// Podman58 is Podman 5.8 with netavark 1.17, from Debian unstable.
func Podman58() PodmanKind { return PodmanKind{"podman58", filepath.Join(cacheDir(), "podman58")} }

// Podman61 is Podman 6.1 with netavark 2.0, from Debian experimental.
func Podman61() PodmanKind { return PodmanKind{"podman61", filepath.Join(cacheDir(), "podman61")} }

// Missing says what the machine lacks to run Podman, or nil.
func (k PodmanKind) Missing() error {
	if _, err := os.Stat(filepath.Join(k.root, "usr/bin/podman")); err != nil {
		return fmt.Errorf("%s (test/setup.sh installs it): %w", k.Name, err)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s: needs root", k.Name)
	}
	return nil
}

// Podman is a pretend host with Podman on it and usernet as its network driver. Its methods may be called from several
// goroutines.
type Podman struct {
	*Host
	Kind PodmanKind
}

// NewPodman makes a pretend host with Podman and loads the test image. The caller closes it.
func NewPodman(ctx context.Context, kind PodmanKind) (*Podman, error) {
	p, err := newPodman(kind)
	if err != nil {
		return nil, err
	}
	if err := p.loadImage(ctx); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func newPodman(kind PodmanKind) (*Podman, error) {
	if err := kind.Missing(); err != nil {
		return nil, err
	}
	host, err := newHost(kind.root)
	if err != nil {
		return nil, fmt.Errorf("%s: make the pretend host: %w", kind.Name, err)
	}
	p := &Podman{Host: host, Kind: kind}
	if err := p.configure(); err != nil {
		p.Close()
		return nil, fmt.Errorf("%s: configure: %w", kind.Name, err)
	}
	return p, nil
}

// loadImage builds the programs and imports the test image.
func (p *Podman) loadImage(ctx context.Context) error {
	image, err := p.programs(ctx)
	if err != nil {
		return err
	}
	if _, err := p.userCommand(ctx, image, "podman", "import", "--change", serveByDefault, "-", Image); err != nil {
		return fmt.Errorf("%s: load the test image: %w", p.Kind.Name, err)
	}
	return nil
}

// configure writes Podman's files. The containers have no cgroups of their own, for this host's are nobody's to share out.
func (p *Podman) configure() error {
	plugins := filepath.Join(p.Dir, "plugins")
	if err := os.Mkdir(plugins, 0o755); err != nil {
		return err
	}
	if err := os.Symlink("../bin/usernet", filepath.Join(plugins, "usernet")); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"containers.conf": `
[containers]
cgroups = "disabled"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
netavark_plugin_dirs = ["` + plugins + `"]
`,
		"storage.conf": `
[storage]
driver = "overlay"
runroot = "/run/containers/storage"
graphroot = "` + filepath.Join(p.Dir, "storage") + `"
`,
		"policy.json": `{"default": [{"type": "insecureAcceptAnything"}]}`,
	} {
		if err := os.WriteFile(p.Path("/etc/containers/"+name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Podman runs podman and returns its standard output without the last newline.
func (p *Podman) Podman(ctx context.Context, args ...string) (string, error) {
	return p.userCommand(ctx, "", "podman", args...)
}

// Docker runs the docker command against Podman's Docker-compatible API, which ServeAPI serves.
func (p *Podman) Docker(ctx context.Context, args ...string) (string, error) {
	return p.command(ctx, "", "docker", args...)
}

// Compose runs docker compose against that API on the given compose file.
func (p *Podman) Compose(ctx context.Context, file string, args ...string) (string, error) {
	return p.command(ctx, file, "docker", append(strings.Fields("compose -f - -p web"), args...)...)
}

// ServeAPI starts podman system service where the docker command looks for its engine.
func (p *Podman) ServeAPI(ctx context.Context) (stop func() error, err error) {
	service, err := p.spawn("podman", "system", "service", "--time", "0", "unix://"+DockerSocket)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	err = service.ready(ctx, func(ctx context.Context) error {
		c, err := p.DialUnix(DockerSocket)(ctx, "", "")
		if err != nil {
			return err
		}
		return c.Close()
	})
	return service.kill, err
}
