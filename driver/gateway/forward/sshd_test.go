package forward

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/crypto/ssh"
)

// sshd is an SSH server with what a machine's has: one user with a key, and unix sockets behind it.
type sshd struct {
	user   string
	key    ssh.PublicKey // of the user
	logins atomic.Int64
	mute   atomic.Bool // it takes connections and says nothing

	mu    sync.Mutex
	keys  []ssh.Signer // of the server
	conns map[net.Conn]bool
}

// newKey makes a key pair and writes it to a file.
func newKey(t testing.TB) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return signer, file
}

func rsaKey(t testing.TB) ssh.Signer {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func newSSHD(t testing.TB, user ssh.Signer) *sshd {
	host, _ := newKey(t)
	return &sshd{user: "core", key: user.PublicKey(), keys: []ssh.Signer{host}, conns: make(map[net.Conn]bool)}
}

// listen serves at an address until the test or the function that it returns ends it, and all its connections.
func (d *sshd) listen(t testing.TB, at string) (addr string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, d.handle)
	return l.Addr().String(), func() { l.Close(); d.breakAll() }
}

func (d *sshd) setKeys(keys ...ssh.Signer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.keys = keys
}

// breakAll ends all connections, as a machine that is stopped does.
func (d *sshd) breakAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		c.Close()
	}
}

func (d *sshd) handle(conn net.Conn) {
	d.mu.Lock()
	d.conns[conn] = true
	config := &ssh.ServerConfig{PublicKeyCallback: func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if c.User() != d.user || !bytes.Equal(key.Marshal(), d.key.Marshal()) {
			return nil, errors.New("who are you")
		}
		return nil, nil
	}}
	for _, k := range d.keys {
		config.AddHostKey(k)
	}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.conns, conn)
	}()
	if d.mute.Load() {
		io.Copy(io.Discard, conn)
		return
	}
	c, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	d.logins.Add(1)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { ssh.DiscardRequests(requests) })
	for ch := range channels {
		wg.Go(func() { forwardUnix(ch) })
	}
	c.Close()
}

// forwardUnix is what sshd does for direct-streamlocal@openssh.com: see PROTOCOL of OpenSSH, section 2.4.
func forwardUnix(ch ssh.NewChannel) {
	var to struct {
		Path      string
		Reserved  string
		Reserved2 uint32
	}
	if ch.ChannelType() != "direct-streamlocal@openssh.com" || ssh.Unmarshal(ch.ExtraData(), &to) != nil {
		ch.Reject(ssh.UnknownChannelType, "no such thing")
		return
	}
	conn, err := net.Dial("unix", to.Path)
	if err != nil {
		ch.Reject(ssh.ConnectionFailed, "open failed")
		return
	}
	defer conn.Close()
	guest, requests, err := ch.Accept()
	if err != nil {
		return
	}
	var both, in sync.WaitGroup
	both.Go(func() {
		ssh.DiscardRequests(requests) // ends with the channel, when there may still be something of it to write
		in.Wait()
		conn.Close()
	})
	in.Go(func() {
		io.Copy(conn, guest)
		conn.(*net.UnixConn).CloseWrite()
	})
	io.Copy(guest, conn)
	guest.CloseWrite()
	in.Wait()
	guest.Close()
	both.Wait()
}
