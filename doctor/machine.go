package doctor

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// machine is what the checks look at. Tests put others in the place of its parts.
type machine struct {
	cfg      Config
	root     fs.FS // of the file system
	run      func(ctx context.Context, name string, args ...string) (string, error)
	getenv   func(string) string
	uid, gid int
	self     string // our own executable
	tunPath  string
	patience time.Duration

	privileged, user trial // see try
	units, ofUser    units // of the system, and the user's
}

func newMachine(cfg Config) *machine {
	self, err := os.Executable()
	if err != nil {
		self = "usernet"
	}
	return &machine{
		cfg: cfg, root: os.DirFS("/"), run: runCommand, getenv: os.Getenv, uid: os.Geteuid(), gid: os.Getegid(), self: self,
		tunPath: "/dev/net/tun", patience: patience,
	}
}

// say is a check's answer.
func say(s Status, format string, args ...any) (finding, bool) {
	return finding{status: s, detail: fmt.Sprintf(format, args...)}, true
}

// fix adds the command that helps.
func fix(command string, s Status, format string, args ...any) (finding, bool) {
	return finding{status: s, detail: fmt.Sprintf(format, args...), fix: command}, true
}

// silence is the answer of a check that does not concern this machine.
func silence() (finding, bool) { return finding{}, false }

// maxFile bounds what is read of a file, in bytes.
const maxFile = 1 << 20

// read reads an ordinary file; what else has its name could keep us waiting.
func (m *machine) read(name string) (string, error) {
	info, err := fs.Stat(m.root, rel(name))
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return "", &fs.PathError{Op: "read", Path: name, Err: fs.ErrInvalid}
	}
	b, err := fs.ReadFile(m.root, rel(name))
	return string(b), err
}

// sysctl reads a kernel setting by its name below /proc/sys; "" if the kernel does not have it.
func (m *machine) sysctl(name string) string {
	text, err := m.read("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(text)
}

// number is a setting that is a number; ok is false if the kernel does not have it.
func (m *machine) number(name string) (n int, ok bool) {
	n, err := strconv.Atoi(m.sysctl(name))
	return n, err == nil
}

func (m *machine) exists(name string) bool {
	_, err := fs.Stat(m.root, rel(name))
	return err == nil
}

// rel is an absolute path as a name in machine.root.
func rel(name string) string {
	if name = strings.TrimPrefix(path.Clean(name), "/"); name != "" {
		return name
	}
	return "."
}

// find looks for a program in $PATH and, because ordinary users often do not have them there, where administrators'
// programs are.
func (m *machine) find(name string) (string, bool) {
	dirs := append(strings.Split(m.getenv("PATH"), ":"), "/usr/local/sbin", "/usr/sbin", "/sbin")
	for _, dir := range dirs {
		if !path.IsAbs(dir) {
			continue
		}
		if p := path.Join(dir, name); m.executable(p) {
			return p, true
		}
	}
	return "", false
}

func (m *machine) executable(name string) bool {
	info, err := fs.Stat(m.root, rel(name))
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// sudo is a command as the user has to type it to be root.
func (m *machine) sudo(command string) string {
	if m.uid == 0 {
		return command
	}
	return "sudo " + command
}

// install is the command that installs a package whose name is the same everywhere.
func (m *machine) install(name string) string {
	for _, tool := range []struct{ program, command string }{
		{"apt-get", "apt-get install "}, {"dnf", "dnf install "}, {"zypper", "zypper install "},
		{"pacman", "pacman -S "}, {"apk", "apk add "},
	} {
		if _, ok := m.find(tool.program); ok {
			return m.sudo(tool.command + name)
		}
	}
	return m.sudo("apt-get install " + name)
}

// runCommand runs a program and returns what it prints, on either channel.
func runCommand(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.WaitDelay = time.Second // for children that keep its output open
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil && text != "" {
		err = fmt.Errorf("%s: %w: %s", path.Base(name), err, firstLine(text))
	}
	return text, err
}

// request asks an HTTP server at a Unix socket, and reads at most maxFile bytes of its answer.
func request(ctx context.Context, socket, method, path string) ([]byte, error) {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(http.MaxBytesReader(nil, resp.Body, maxFile)); err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s: %s", method, path, resp.Status)
	}
	return b.Bytes(), nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// older tells whether version a, as in "4.9.1-rc2", is before b; what is no number ends the comparison.
func older(a, b string) bool {
	return slices.Compare(numbers(a), numbers(b)) < 0
}

func numbers(version string) []int {
	var ns []int
	for part := range strings.SplitSeq(strings.TrimPrefix(version, "v"), ".") {
		digits := part[:len(part)-len(strings.TrimLeft(part, "0123456789"))]
		n, err := strconv.Atoi(digits)
		if err != nil {
			break
		}
		ns = append(ns, n)
		if digits != part {
			break
		}
	}
	return ns
}

// once keeps the answer of a question that several checks ask.
type once[T any] struct {
	once  sync.Once
	value T
}

func (o *once[T]) get(ask func() T) T {
	o.once.Do(func() { o.value = ask() })
	return o.value
}
