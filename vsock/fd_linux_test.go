package vsock

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// asChild has the URLs that a copy of the test binary is to listen on.
const asChild = "USERNET_VSOCK_LISTEN"

// child tells for each URL what listens there, or why nothing does, and serves them all until its input ends.
func child() int {
	var (
		ls []net.Listener
		wg sync.WaitGroup
	)
	for _, url := range strings.Fields(os.Getenv(asChild)) {
		a, err := Parse(url)
		if err != nil {
			fmt.Println(err)
			continue
		}
		l, err := Listen(a)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Printf("%T %s\n", l, l.Addr())
		ls = append(ls, l)
		wg.Go(func() { serveEcho(l) })
	}
	fmt.Println()
	io.Copy(io.Discard, os.Stdin)
	for _, l := range ls {
		l.Close()
	}
	wg.Wait()
	return 0
}

// activate starts the child as systemd does, with files and their names, and returns what it says of the URLs.
func activate(t *testing.T, names string, files []*os.File, urls ...string) (said []string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, self)
	cmd.Env = append(os.Environ(), asChild+"="+strings.Join(urls, " "), fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+names)
	cmd.ExtraFiles = files
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("child: %v\n%s", err, &stderr)
		}
	})
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != ""; {
		said = append(said, lines.Text())
	}
	return said
}

// listeningFile is a listener as systemd holds it.
func listeningFile(t *testing.T, family int, sa unix.Sockaddr, kind int) *os.File {
	t.Helper()
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	t.Cleanup(func() { f.Close() })
	if err := unix.Bind(fd, sa); err != nil {
		t.Fatal(err)
	}
	if kind == unix.SOCK_STREAM {
		if err := unix.Listen(fd, 16); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func TestActivation(t *testing.T) {
	noLeaks(t)
	url, path := socketURL(t)
	files := []*os.File{
		listeningFile(t, unix.AF_VSOCK, &unix.SockaddrVM{CID: cidAny, Port: portAny}, unix.SOCK_STREAM),
		listeningFile(t, unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, unix.SOCK_STREAM),
		listeningFile(t, unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}, unix.SOCK_DGRAM),
		listeningFile(t, unix.AF_UNIX, &unix.SockaddrUnix{Name: path}, unix.SOCK_STREAM),
	}
	said := activate(t, "vm:web:dns:api", files, "fd:vm", "fd:web", "fd:dns", "fd:3", "fd:nobody", "fd:", "fd:api")
	sa, err := unix.Getsockname(int(files[0].Fd()))
	if err != nil {
		t.Fatal(err)
	}
	ours := vsock.Addr{ContextID: cidAny, Port: sa.(*unix.SockaddrVM).Port}
	want := []string{
		"vsock.listener " + ours.String(),
		"*net.TCPListener 127.0.0.1:",
		"listen on fd:dns: descriptor 5: it is no stream socket",
		"vsock.listener " + ours.String(),
		`listen on fd:nobody: systemd has passed 4 sockets with the names ["vm" "web" "dns" "api"]`,
		"listen on fd:: systemd has passed 4 sockets: say which",
		"*net.UnixListener " + path,
	}
	for i, w := range want {
		if i >= len(said) || !strings.HasPrefix(said[i], w) {
			t.Fatalf("the child says %q, want as number %d %q", said, i, w)
		}
	}
	talk(t, dial(t, url))
	talk(t, dial(t, "tcp://"+strings.TrimPrefix(said[1], "*net.TCPListener ")))
	if loopback(t) {
		talk(t, dial(t, fmt.Sprintf("vsock://local:%d", ours.Port)))
	}
}

// TestActivationNot: what was passed to another process is not ours.
func TestActivationNot(t *testing.T) {
	t.Setenv("LISTEN_PID", "1")
	t.Setenv("LISTEN_FDS", "1")
	_, err := Listen(mustParse(t, "fd:3"))
	if want := "listen on fd:3: systemd has passed nothing to this process"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if _, err := Dial(soon(t), mustParse(t, "fd:3")); err == nil || !strings.Contains(err.Error(), "not to dial") {
		t.Errorf("dial: %v", err)
	}
}

func TestPassed(t *testing.T) {
	for _, tt := range []struct {
		fds, names, name string
		fd               int
		err              string
	}{
		{"1", "", "", 3, ""},
		{"1", "web", "web", 3, ""},
		{"2", "web:api", "api", 4, ""},
		{"2", "web:api", "4", 4, ""},
		{"2", "web:3", "3", 4, ""},
		{"1", "", "3", 3, ""},
		{"2", "web:web", "web", 0, "fd:3 or fd:4"},
		{"2", "web:api", "", 0, "2 sockets: say which"},
		{"2", "web:api", "5", 0, "2 sockets with the names"},
		{"2", "web:api", "2", 0, "2 sockets with the names"},
		{"1", "web:api", "api", 0, "1 sockets with the names"},
		{"0", "", "", 0, `LISTEN_FDS="0"`},
		{"-1", "", "3", 0, `LISTEN_FDS="-1"`},
		{"x", "", "", 0, `LISTEN_FDS="x"`},
		{"99999999999", "", "77", 0, "LISTEN_FDS="},
	} {
		env := map[string]string{"LISTEN_PID": "7", "LISTEN_FDS": tt.fds, "LISTEN_FDNAMES": tt.names}
		fd, err := passed(func(name string) string { return env[name] }, 7, tt.name)
		if fd != tt.fd || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s of %s %q: %d, %v, want %d, %s", tt.name, tt.fds, tt.names, fd, err, tt.fd, tt.err)
		}
	}
}
