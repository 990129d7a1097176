package vm_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/usernet/usernet/test/engine"
)

// gvproxy: usernet by gvproxy's name, with the flags that podman machine has for QEMU.
func gvproxy(r *rig) {
	key, signer := r.key()
	socket, log := filepath.Join(r.m.Own, "machine-api.sock"), filepath.Join(r.m.Own, "gvproxy.log")
	g := r.asGvproxy(engine.Gvproxy, "-mtu", "1500", "-ssh-port", "3022", "-listen-qemu", "unix://"+r.frames(),
		"-forward-sock", socket, "-forward-dest", "/run/page.sock", "-forward-user", "core", "-forward-identity", key,
		"-log-file", log)
	defer func() {
		if text, err := os.ReadFile(log); r.Failed() && err == nil {
			r.Logf("gvproxy.log:\n%s", text)
		}
	}()
	if pid := r.on("cat", r.pidFile()); strings.ContainsFunc(pid, func(c rune) bool { return c < '0' || c > '9' }) {
		r.Errorf("the file of the process is %q", pid)
	}
	r.starts("sshd", "sshd")
	r.lease("eth0")
	r.works(want("inet "+first+"/24"), "ip", "addr", "show", "eth0")
	r.works(want(hostAlias), "probe", "resolve", "host.containers.internal")
	r.works(want("peer "+hostIP+":"), "probe", "fetch", "http://"+far+"/")
	r.works(want(far), "probe", "resolve", engine.FarName)
	r.wait("the page behind the socket", func() error {
		text, err := r.ask(socket, "/", "")
		if err != nil {
			return err
		}
		return contains(text, "page behind SSH")
	})
	r.login("127.0.0.1:3022", signer)

	// The machine is switched off; podman machine leaves gvproxy alone then.
	r.off()
	select {
	case <-g.Ended():
	case <-time.After(patience):
		r.Fatal("gvproxy stays when the machine has gone")
	}
	if g.Status() != 0 {
		r.Errorf("gvproxy ended with status %d", g.Status())
	}
	if there(r.pidFile()) == nil {
		r.Error("the file of the process is left")
	}
}

// key makes a key for SSH and returns its file, which is the user's on the host.
func (r *rig) key() (path string, _ ssh.Signer) {
	r.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	r.must(err)
	signer, err := ssh.NewSignerFromKey(private)
	r.must(err)
	block, err := ssh.MarshalPrivateKey(private, "")
	r.must(err)
	path = filepath.Join(r.m.Own, "identity")
	r.must(os.WriteFile(path, pem.EncodeToMemory(block), 0o600))
	r.must(r.m.Give(path))
	return path, signer
}

// login runs a command by the machine's SSH server.
func (r *rig) login(addr string, key ssh.Signer) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	conn, err := engine.Dial(ctx, r.host(), "tcp", addr)
	r.must(err)
	defer conn.Close()
	r.must(conn.SetDeadline(time.Now().Add(patience)))
	c, channels, requests, err := ssh.NewClientConn(conn, addr, &ssh.ClientConfig{
		User: "core", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	r.must(err)
	client := ssh.NewClient(c, channels, requests)
	defer client.Close()
	session, err := client.NewSession()
	r.must(err)
	var out bytes.Buffer
	session.Stdout = &out
	r.must(session.Run("a shell"))
	r.check(contains(out.String(), "asked for a shell"))
}

// peers: usernet and gvisor-tap-vsock, one at each end of the vsock.
func peers(r *rig) {
	r.modules("vmw_vsock_virtio_transport", "tun")
	socket := r.vsock() + "_1024"
	r.in("sh", "-c", "mkdir -p /etc/udhcpc && ln -s /payload/lease.sh /etc/udhcpc/default.script")
	for _, c := range []struct{ host, machine string }{
		{engine.Gvproxy, realGvforwarder},
		{engine.RealGvproxy, "gvforwarder"},
		{engine.RealGvproxy, "agent"},
	} {
		r.Run(c.host+" and "+c.machine, func(t *testing.T) {
			sub := *r
			sub.T = t
			sub.pair(socket, c.host, c.machine)
		})
	}
}

// pair checks the network of the machine with one program on the host and one in the machine.
func (r *rig) pair(socket, host, machine string) {
	r.asGvproxy(host, "-listen", "unix://"+socket, "-ssh-port", "-1")
	r.wait("the socket", func() error { return there(socket) }) // the real gvproxy writes the file before it listens
	args := []string{machine, "-url", "vsock://2:1024/connect"}
	if machine == "agent" {
		args = append([]string{"usernet"}, args...)
	}
	program := r.starts(machine, args...)
	defer func() { // the next one makes the interface anew
		r.kill(program)
		r.wait("the interface to go", func() error {
			if out, err := r.try("ip", "link", "show", "tap0"); err == nil {
				return fmt.Errorf("there is %s", out)
			}
			return nil
		})
	}()
	r.address("tap0", "inet "+first+"/24")
	r.works(want("peer "+hostIP+":"), "probe", "fetch", "http://"+far+"/")
	r.works(want(far), "probe", "resolve", engine.FarName)
	r.works(want("peer "+hostIP+":", "knock"), "probe", "udp", far+":7", "knock")
	r.works(want("500000 bytes came back"), "probe", "bulk", far+":7", "500000")
	r.works(want("1 packets received"), "ping", "-c", "1", "-W", "10", gateway)
	r.starts("serve", "probe", "serve")
	if _, err := r.ask(socket, "/services/forwarder/expose", `{"local":":8080","remote":"`+first+`:80"}`); err != nil {
		r.Fatal(err)
	}
	r.page(r.outside(), hostIP+":8080", "hello from", "local "+first+":80")
}
