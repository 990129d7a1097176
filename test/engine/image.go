package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Image is the name of the test image: busybox with its applets in /bin, and the probe as /bin/probe.
const Image = "usernet-test"

// loadImage imports the test image into Docker.
func (e *Engine) loadImage(ctx context.Context) error {
	image, err := e.programs(ctx)
	if err != nil {
		return err
	}
	_, err = e.command(ctx, image, "docker", "import", "--change", serveByDefault, "-", Image)
	return err
}

// serveByDefault makes a container of the test image serve when it is not told what to do.
const serveByDefault = `CMD ["/bin/probe","serve"]`

// programs builds usernet and the probe into the host's directory and returns the test image as a tar file.
func (h *Host) programs(ctx context.Context) (string, error) {
	bin := filepath.Join(h.Dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", err
	}
	if err := build(ctx, bin); err != nil {
		return "", err
	}
	return imageTar(ctx, filepath.Join(bin, "probe"))
}

// build puts the programs into dir. USERNET_BIN names a finished usernet to use instead of building one;
// USERNET_TEST_RACE builds it with the race detector.
func build(ctx context.Context, dir string) error {
	top, err := moduleDir(ctx)
	if err != nil {
		return err
	}
	compile := func(cgo string, args ...string) error {
		cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-buildvcs=false", "-o", dir + "/"}, args...)...)
		cmd.Dir = top
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go build %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	const probe, usernet = "./test/cmd/probe", "./cmd/usernet"
	ready := os.Getenv("USERNET_BIN")
	switch {
	case ready != "":
		b, err := os.ReadFile(ready)
		if err != nil {
			return err
		}
		return errors.Join(compile("0", probe), os.WriteFile(filepath.Join(dir, "usernet"), b, 0o755))
	case os.Getenv("USERNET_TEST_RACE") != "":
		return errors.Join(compile("0", probe), compile("1", "-race", usernet))
	}
	return compile("0", probe, usernet)
}

func moduleDir(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

func imageTar(ctx context.Context, probe string) (string, error) {
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return "", err
	}
	applets, err := exec.CommandContext(ctx, "/bin/busybox", "--list").Output()
	if err != nil {
		return "", fmt.Errorf("list busybox's applets: %w", err)
	}
	program, err := os.ReadFile(probe)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var errs []error
	put := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		errs = append(errs, w.WriteHeader(&h))
		_, err := w.Write(content)
		errs = append(errs, err)
	}
	for _, dir := range []string{"bin/", "etc/", "tmp/", "proc/", "sys/", "dev/"} {
		put(tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	put(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, busybox)
	put(tar.Header{Name: "bin/probe", Typeflag: tar.TypeReg, Mode: 0o755}, program)
	put(tar.Header{Name: "etc/passwd", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("root:x:0:0:root:/:/bin/sh\n"))
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			put(tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	errs = append(errs, w.Close())
	return b.String(), errors.Join(errs...)
}
