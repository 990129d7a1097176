package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Paths of a host with container runtimes that call CNI plugins.
const (
	CNIPlugins = "/opt/cni/bin"   // usernet's and the official ones
	CNIConfig  = "/etc/cni/net.d" // of networks
)

// CNI is a pretend host with what calls CNI plugins: cnitool, containerd and Podman 4.3. Its methods may be called from
// several goroutines.
type CNI struct {
	*Host
	containerd *process
}

// WithCNI runs a test on a new host of that kind, as Each does.
func WithCNI(t *testing.T, run func(t *testing.T, c *CNI)) {
	root := filepath.Join(cacheDir(), "cni")
	if err := missingCNI(root); err != nil {
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	host, err := newHost(root)
	if err != nil {
		t.Fatal(err)
	}
	defer host.end(t)
	c := &CNI{Host: host}
	if err := c.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, c)
}

func missingCNI(root string) error {
	for _, f := range []string{filepath.Join(root, "usr/bin/podman"), filepath.Join(cacheDir(), "cnitool")} {
		if _, err := os.Stat(f); err != nil {
			return fmt.Errorf("CNI (test/setup.sh installs it): %w", err)
		}
	}
	if os.Geteuid() != 0 {
		return errors.New("CNI: needs root")
	}
	return nil
}

// prepare puts the plugins where runtimes look for them, makes the test image and writes the runtimes' files.
func (c *CNI) prepare(ctx context.Context) error {
	image, err := c.programs(ctx)
	if err != nil {
		return err
	}
	if err := unpack(image, filepath.Join(c.Dir, "rootfs")); err != nil {
		return err
	}
	cnitool, err := os.ReadFile(filepath.Join(cacheDir(), "cnitool"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "bin/cnitool"), cnitool, 0o755); err != nil {
		return err
	}
	if _, err := c.Run(ctx, "mkdir", "-p", CNIPlugins, CNIConfig); err != nil {
		return err
	}
	if _, err := c.Run(ctx, "sh", "-c", "cp -a /usr/lib/cni/* "+CNIPlugins+" && ln -s "+c.Dir+"/bin/usernet "+CNIPlugins+"/usernet"); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"/etc/containers/containers.conf": `
[containers]
cgroups = "disabled"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
[network]
network_backend = "cni"
cni_plugin_dirs = ["` + CNIPlugins + `"]
`,
		"/etc/containers/storage.conf": `
[storage]
driver = "overlay"
runroot = "/run/containers/storage"
graphroot = "` + filepath.Join(c.Dir, "storage") + `"
`,
		"/etc/containers/policy.json": `{"default": [{"type": "insecureAcceptAnything"}]}`,
		"/etc/containerd/config.toml": `
version = 2
root = "` + filepath.Join(c.Dir, "containerd") + `"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
`,
	} {
		if err := os.MkdirAll(filepath.Dir(c.Path(name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(c.Path(name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	_, err = c.command(ctx, image, "podman", "import", "--change", serveByDefault, "-", Image)
	return err
}

// unpack writes a tar file of directories, files and symbolic links into a directory.
func unpack(image, dir string) error {
	for r := tar.NewReader(strings.NewReader(image)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		path := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o755)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, path)
		default:
			var b []byte
			if b, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, b, os.FileMode(h.Mode))
			}
		}
		if err != nil {
			return fmt.Errorf("unpack the test image: %w", err)
		}
	}
}

// Plugin runs a CNI plugin with a configuration on its standard input.
func (c *CNI) Plugin(ctx context.Context, name, conf string, env ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := c.Command(ctx, filepath.Join(CNIPlugins, name))
	cmd.Env = append(append(cmd.Env, "CNI_PATH="+CNIPlugins), env...)
	return c.finish(ctx, cmd, conf)
}

// Tool runs cnitool.
func (c *CNI) Tool(ctx context.Context, env []string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := c.Command(ctx, filepath.Join(c.Dir, "bin/cnitool"), args...)
	cmd.Env = append(append(cmd.Env, "CNI_PATH="+CNIPlugins, "NETCONFPATH="+CNIConfig), env...)
	return c.finish(ctx, cmd, "")
}

// StartContainerd starts containerd.
func (c *CNI) StartContainerd(ctx context.Context) (err error) {
	if c.containerd, err = c.spawn("containerd", "--config", "/etc/containerd/config.toml"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return c.containerd.ready(ctx, func(ctx context.Context) error {
		_, err := c.Run(ctx, "ctr", "version")
		return err
	})
}

// StopContainerd stops containerd.
func (c *CNI) StopContainerd() error { return c.containerd.kill() }
