// Sshd is what gvproxy needs of a virtual machine's SSH server: it lets anybody in who comes with a key, for connections to
// unix sockets, and answers commands with their own text. Behind /run/page.sock it has an HTTP server of its own, as Podman would.
package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"

	"golang.org/x/crypto/ssh"
)

func main() {
	fmt.Fprintln(os.Stderr, "sshd:", serve())
	os.Exit(1)
}

// serve serves until that fails.
func serve() error {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	key, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return err
	}
	cfg := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
	cfg.AddHostKey(key)
	page, err := net.Listen("unix", "/run/page.sock")
	if err != nil {
		return err
	}
	go http.Serve(page, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "page behind SSH") }))
	l, err := net.Listen("tcp", ":22")
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			if err := talk(conn, cfg); err != nil {
				fmt.Println("sshd:", err)
			}
		}()
	}
}

func talk(conn net.Conn, cfg *ssh.ServerConfig) error {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, cfg)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	go ssh.DiscardRequests(requests)
	for c := range channels {
		switch c.ChannelType() {
		case "direct-streamlocal@openssh.com":
			go forward(c)
		case "session":
			go session(c)
		default:
			c.Reject(ssh.UnknownChannelType, c.ChannelType())
		}
	}
	return nil
}

// forward joins a channel to a unix socket; see PROTOCOL of OpenSSH, section 2.4.
func forward(c ssh.NewChannel) {
	var want struct {
		Path     string
		Reserved string
		Port     uint32
	}
	if err := ssh.Unmarshal(c.ExtraData(), &want); err != nil {
		c.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	to, err := net.Dial("unix", want.Path)
	if err != nil {
		c.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	defer to.Close()
	from, requests, err := c.Accept()
	if err != nil {
		return
	}
	defer from.Close()
	go ssh.DiscardRequests(requests)
	var wg sync.WaitGroup
	wg.Go(func() {
		io.Copy(to, from)
		to.(*net.UnixConn).CloseWrite()
	})
	io.Copy(from, to)
	from.CloseWrite()
	wg.Wait()
}

// session answers a command with its text.
func session(c ssh.NewChannel) {
	channel, requests, err := c.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	for r := range requests {
		var command struct{ Text string }
		ok := r.Type == "exec" && ssh.Unmarshal(r.Payload, &command) == nil
		r.Reply(ok, nil)
		if ok {
			fmt.Fprintln(channel, "asked for", command.Text)
			channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{0}))
			return
		}
	}
}
