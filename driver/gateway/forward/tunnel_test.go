package forward

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/vsock"
)

// socketMachine is a service at a unix socket of a machine.
func socketMachine(t testing.TB, handle func(net.Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "guest.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, handle)
	return path
}

func remote(addr, path, key, passphrase string) string {
	u := url.URL{Scheme: "ssh-tunnel", User: url.User("core"), Host: addr, Path: path}
	u.RawQuery = url.Values{"key": {key}, "passphrase": {passphrase}}.Encode()
	return u.String()
}

// tunnelled is a forward to a service behind an SSH server.
type tunnelled struct {
	*Forward
	sshd    *sshd
	addr    string // of the server
	stop    func() // of the server
	local   string
	network *fake
}

func newTunnelled(t testing.TB, handle func(net.Conn), change func(*limits)) *tunnelled {
	t.Helper()
	user, file := newKey(t)
	v := &tunnelled{sshd: newSSHD(t, user), local: filepath.Join(t.TempDir(), "s"), network: newFake()}
	v.addr, v.stop = v.sshd.listen(t, "127.0.0.1:0")
	v.Forward = start(t, v.network, gvproxy.Unix, v.local, remote(v.addr, socketMachine(t, handle), file, ""), change)
	return v
}

func (v *tunnelled) dial(t testing.TB) net.Conn {
	t.Helper()
	return dial(t, "unix", v.local)
}

func TestTunnel(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, shout, nil)
	if n := len(v.network.clients); n != 0 {
		t.Errorf("%d dials before the first client", n)
	}
	big := make([]byte, 3<<20)
	rand.Read(big)
	var wg sync.WaitGroup
	for i := range 5 {
		conn := v.dial(t)
		wg.Go(func() {
			text := append(bytes.Clone(big), byte(i))
			conn.Write(text)
			conn.(*net.UnixConn).CloseWrite()
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, append([]byte("got "), text...)) {
				t.Errorf("answer of %d bytes, %v, want the %d sent", len(got), err, len(text)+4)
			}
		})
	}
	wg.Wait()
	if n := v.sshd.logins.Load(); n != 1 {
		t.Errorf("%d logins for 5 clients at once", n)
	}
	ask(t, v.dial(t), "hello")
	eventually(t, "all end", func() bool { return v.Stats() == Stats{Accepted: 6} })
}

// TestTunnelHalfClose: a service may end its direction first.
func TestTunnelHalfClose(t *testing.T) {
	noLeaks(t)
	heard := make(chan string, 1)
	v := newTunnelled(t, func(conn net.Conn) {
		io.WriteString(conn, "first")
		conn.(*net.UnixConn).CloseWrite()
		text, err := io.ReadAll(conn)
		heard <- fmt.Sprint(string(text), err)
	}, nil)
	conn := v.dial(t)
	if text, err := io.ReadAll(conn); err != nil || string(text) != "first" {
		t.Errorf("answer %q, %v", text, err)
	}
	io.WriteString(conn, "second")
	conn.Close()
	if got := <-heard; got != "second<nil>" {
		t.Errorf("the service heard %q", got)
	}
	eventually(t, "it ends", func() bool { return v.Stats().Active == 0 })
}

// TestTunnelEnds: when either end goes away, so does the other one.
func TestTunnelEnds(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, func(conn net.Conn) {
		text := make([]byte, 1)
		if io.ReadFull(conn, text); text[0] == 'x' {
			return
		}
		conn.Write(text)
		echo(conn)
	}, nil)
	conn := v.dial(t)
	exchange(t, conn, "hello")
	conn.Close()
	eventually(t, "the client's is gone", func() bool { return v.Stats().Active == 0 })
	conn = v.dial(t)
	io.WriteString(conn, "x")
	gone(t, conn, true)
	conn.Close()
	eventually(t, "the service's is gone", func() bool { return v.Stats().Active == 0 })
	conn = v.dial(t)
	exchange(t, conn, "hello")
	closeSoon(t, v.Forward)
	gone(t, conn, true)
}

func TestTunnelNoSocket(t *testing.T) {
	noLeaks(t)
	user, file := newKey(t)
	d := newSSHD(t, user)
	addr, _ := d.listen(t, "127.0.0.1:0")
	path := filepath.Join(t.TempDir(), "later.sock")
	local := filepath.Join(t.TempDir(), "s")
	f := start(t, newFake(), gvproxy.Unix, local, remote(addr, path, file, ""), nil)
	turnedAway(t, "unix", local)
	eventually(t, "the failure is counted", func() bool { return f.Stats() == Stats{Accepted: 1, Failed: 1} })
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, shout)
	ask(t, dial(t, "unix", local), "hello")
	if n := d.logins.Load(); n != 1 {
		t.Errorf("%d logins", n)
	}
	spec, err := gvproxy.ParseForward(gvproxy.Unix, local, remote(addr, path, file, ""))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), spec, newFake(), slog.New(slog.DiscardHandler)); !errors.Is(err, vsock.ErrInUse) {
		t.Errorf("open a second one: %v, want ErrInUse", err)
	}
}

func TestTunnelPassphrase(t *testing.T) {
	noLeaks(t)
	const file = "testdata/encrypted_key" // by ssh-keygen, for this test only
	user, err := readKey(file, "open sesame & more")
	if err != nil {
		t.Fatal(err)
	}
	d := newSSHD(t, user)
	addr, _ := d.listen(t, "127.0.0.1:0")
	local := filepath.Join(t.TempDir(), "s")
	start(t, newFake(), gvproxy.Unix, local, remote(addr, socketMachine(t, shout), file, "open sesame & more"), nil)
	ask(t, dial(t, "unix", local), "hello")

	_, plain := newKey(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ file, passphrase, want string }{
		{file, "wrong", "key " + file + ": "},
		{file, "", "key " + file + ": ssh: this private key is passphrase protected"},
		{plain, "not needed", ""},
		{empty, "", "key " + empty + ": ssh: no key found"},
		{filepath.Dir(plain), "", filepath.Dir(plain) + " is not a key file"},
		{plain + "x", "", "no such file"},
	} {
		local := filepath.Join(t.TempDir(), "s")
		spec, err := gvproxy.ParseForward(gvproxy.Unix, local, remote(addr, "/s", tt.file, tt.passphrase))
		if err != nil {
			t.Fatal(err)
		}
		f, err := Open(t.Context(), spec, newFake(), slog.New(slog.DiscardHandler))
		if err == nil {
			f.Close()
		}
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s, %s: %v, want … %s …", tt.file, tt.passphrase, err, tt.want)
		}
		if _, e := os.Lstat(local); e == nil {
			t.Errorf("%s: a socket is left", tt.file)
		}
	}
}

// TestTunnelBoot: the first client comes before the machine is up, and waits.
func TestTunnelBoot(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, shout, nil)
	v.stop()
	conn := v.dial(t)
	for range 3 { // refused
		<-v.network.clients
	}
	v.sshd.listen(t, v.addr)
	ask(t, conn, "hello")
	if n := v.sshd.logins.Load(); n != 1 {
		t.Errorf("%d logins", n)
	}
}

func TestTunnelReconnect(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, echo, nil)
	for range 3 {
		conn, other := v.dial(t), v.dial(t)
		exchange(t, conn, "hello")
		exchange(t, other, "hello")
		v.sshd.breakAll()
		gone(t, conn, true)
		gone(t, other, true)
	}
	exchange(t, v.dial(t), "hello")
	if n := v.sshd.logins.Load(); n != 4 {
		t.Errorf("%d logins, want 4", n)
	}
}

// TestTunnelResets: over TCP, what ends with the session is no end of file. Only a forward that was made by hand is like this.
func TestTunnelResets(t *testing.T) {
	noLeaks(t)
	user, file := newKey(t)
	d := newSSHD(t, user)
	addr, _ := d.listen(t, "127.0.0.1:0")
	spec, err := gvproxy.ParseForward(gvproxy.Unix, "", remote(addr, socketMachine(t, echo), file, ""))
	if err != nil {
		t.Fatal(err)
	}
	spec.Key = gvproxy.Key{Proto: gvproxy.TCP, Local: freePort(t, "127.0.0.1")}
	f, err := Open(t.Context(), spec, newFake(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeSoon(t, f) })
	for range 5 {
		conn := dial(t, "tcp", spec.Local)
		exchange(t, conn, "hello")
		d.breakAll()
		gone(t, conn, false)
	}
}

// TestTunnelMute: a server that takes connections and never says a word.
func TestTunnelMute(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, shout, func(l *limits) { l.ssh.attempt, l.ssh.wait = 100*time.Millisecond, 500*time.Millisecond })
	v.sshd.mute.Store(true)
	conn := v.dial(t)
	gone(t, conn, true)
	eventually(t, "the failure is counted", func() bool { return v.Stats() == Stats{Accepted: 1, Failed: 1} })
	if n := len(v.network.clients); n < 2 {
		t.Errorf("%d attempts, want several", n)
	}
	conn = v.dial(t)
	v.sshd.mute.Store(false)
	ask(t, conn, "hello")
}

// TestTunnelHole: nobody is at the server's address; Close does not wait for that.
func TestTunnelHole(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, shout, func(l *limits) { l.waiting = 2 })
	v.network.change(func(n *fake) { n.holes = 1000 })
	first, second := v.dial(t), v.dial(t)
	eventually(t, "both wait", func() bool { return v.Stats().Active == 2 })
	<-v.network.clients
	turnedAway(t, "unix", v.local) // one too many
	closeSoon(t, v.Forward)
	gone(t, first, true)
	gone(t, second, true)
}

// frozen is a connection that can be made to stand still, as one to a machine that has vanished.
type frozen struct {
	net.Conn
	still chan struct{} // closed: it does
	end   chan struct{}
	once  sync.Once
}

func (c *frozen) Write(p []byte) (int, error) {
	select {
	case <-c.still:
		return len(p), nil // into the send buffer
	default:
		return c.Conn.Write(p)
	}
}

func (c *frozen) Close() error {
	c.once.Do(func() { close(c.end) })
	return c.Conn.Close()
}

// TestTunnelVanished: a machine that is there no more sends no end of file.
func TestTunnelVanished(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, echo, func(l *limits) { l.ssh.probe, l.ssh.silence = 50*time.Millisecond, 300*time.Millisecond })
	conns := make(chan *frozen, 10)
	v.network.change(func(n *fake) {
		n.wrapTCP = func(c net.Conn) net.Conn {
			f := &frozen{Conn: c, still: make(chan struct{}), end: make(chan struct{})}
			conns <- f
			return f
		}
	})
	conn := v.dial(t)
	exchange(t, conn, "hello")
	transport := <-conns
	select {
	case <-transport.end:
		t.Error("a session with a live server was ended")
	case <-time.After(200 * time.Millisecond): // some probes
	}
	exchange(t, conn, "hello")
	close(transport.still)
	other := v.dial(t) // waits for an answer, and then for the next session
	<-transport.end
	gone(t, conn, true)
	exchange(t, other, "hello")
}

// TestTunnelHostKey: the key that a server has at the first login is its key. Another one is not waited for to change.
func TestTunnelHostKey(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, shout, nil)
	own := v.sshd.keys[0]
	other, _ := newKey(t)
	ask(t, v.dial(t), "hello")

	v.sshd.setKeys(other)
	v.sshd.breakAll()
	gone(t, v.dial(t), true)
	eventually(t, "the failure is counted", func() bool { return v.Stats() == Stats{Accepted: 2, Failed: 1} })
	if n := v.sshd.logins.Load(); n != 1 {
		t.Errorf("%d logins: it believed another key", n)
	}

	v.sshd.setKeys(rsaKey(t), own)
	ask(t, v.dial(t), "hello")
}

// TestTunnelUnknownUser: a machine that boots may not know the key yet. That, too, is tried again.
func TestTunnelUnknownUser(t *testing.T) {
	noLeaks(t)
	v := newTunnelled(t, shout, nil)
	v.sshd.mu.Lock()
	key := v.sshd.key
	v.sshd.key = v.sshd.keys[0].PublicKey()
	v.sshd.mu.Unlock()
	conn := v.dial(t)
	for range 2 {
		<-v.network.clients
	}
	v.sshd.mu.Lock()
	v.sshd.key = key
	v.sshd.mu.Unlock()
	ask(t, conn, "hello")
}
