package gvproxy_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// guest is a network namespace that has its network from a gateway alone, by gvforwarder.
type guest struct {
	ns  *netns.NS
	got *bufio.Reader // what udhcpc was given, a line at a time
}

// newGuest makes a namespace in which udhcpc is busybox's, with a script that does what Debian's does, but leaves /etc alone.
func newGuest(t *testing.T) (g *guest, bin string) {
	t.Helper()
	g = &guest{ns: nettest.NewNS(t)}
	bin = t.TempDir()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		err = fmt.Errorf("test/setup.sh installs it: %w", err)
		if os.Getenv("USERNET_TEST_STRICT") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	leases := filepath.Join(bin, "leases")
	if err := unix.Mkfifo(leases, 0o600); err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(bin, "script")
	write(t, script, `#!/bin/sh
[ "$1" = bound ] || exit 0
set -e
ip addr add "$ip/$mask" dev "$interface"
ip link set dev "$interface" mtu "$mtu"
ip route add default via "$router"
echo "$ip/$mask router=$router dns=$dns mtu=$mtu lease=$lease server=$serverid" > `+leases+"\n")
	write(t, filepath.Join(bin, "udhcpc"), "#!/bin/sh\nexec "+busybox+" udhcpc -s "+script+` "$@"`+"\n")
	// Opened for writing, too: then it opens at once, and never ends.
	f, err := os.OpenFile(leases, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	g.got = bufio.NewReader(f)
	return g, bin
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// forward runs gvforwarder in the guest until the test is over and returns what DHCP has given.
func (g *guest) forward(t *testing.T, bin, url string) (lease string) {
	t.Helper()
	forwarder := cached(t, "gvforwarder")
	cmd := exec.Command(forwarder, "-url", url, "-iface", "tap0", "-stop-if-exist", "")
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := g.ns.Do(func() error { return cmd.Start() }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("gvforwarder said:\n%s", said.Bytes()[:min(said.Len(), 4000)])
		}
	})
	lease, err := g.got.ReadString('\n')
	if err != nil {
		t.Fatalf("no address by DHCP: %v", err)
	}
	return strings.TrimSpace(lease)
}

// command runs a program in the guest and returns what it printed.
func (g *guest) command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := g.ns.Do(cmd.Start); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// dial connects from the guest.
func (g *guest) dial(t *testing.T, network, addr string) (conn net.Conn, err error) {
	t.Helper()
	err = g.ns.Do(func() error {
		conn, err = net.DialTimeout(network, netip.MustParseAddrPort(addr).String(), patience)
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	return conn, conn.SetDeadline(time.Now().Add(patience))
}

// greet serves one side of an exchange until the test is over: whoever comes is told who he is, and what he says comes back, behind that.
func greet(t *testing.T, do func(func() error) error, network, addr string) {
	t.Helper()
	err := do(func() error {
		if network == "udp" {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			go func() {
				b := make([]byte, 65536)
				for {
					n, from, err := c.ReadFrom(b)
					if err != nil {
						return
					}
					c.WriteTo(append([]byte(from.String()+" "), b[:n]...), from)
				}
			}()
			return nil
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					fmt.Fprintf(conn, "%s ", conn.RemoteAddr())
					io.Copy(conn, conn)
				}()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// here runs f in the test's own namespace, the host.
func here(f func() error) error { return f() }

// talk has a short conversation with greet and returns whom it has taken us for.
func talk(t *testing.T, conn net.Conn, err error) (who string) {
	t.Helper()
	if err != nil {
		t.Error(err)
		return ""
	}
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Error(err)
		return ""
	}
	var said []byte
	b := make([]byte, 1024)
	for !bytes.HasSuffix(said, []byte(" hello")) {
		n, err := conn.Read(b)
		if err != nil {
			t.Errorf("after %q: %v", said, err)
			return ""
		}
		said = append(said, b[:n]...)
	}
	who, _, _ = strings.Cut(string(said), " ")
	host, _, err := net.SplitHostPort(who)
	if err != nil {
		t.Error(err)
	}
	return host
}

// ask asks the guest's name server and returns the code and the addresses of the answer.
func (g *guest) ask(t *testing.T, network, name string, kind dnsmessage.Type) string {
	t.Helper()
	query := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 4711, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}
	b, err := query.Pack()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := g.dial(t, network, "192.168.127.1:53")
	if err != nil {
		return err.Error()
	}
	answer := make([]byte, 4096)
	var n int
	if network == "tcp" {
		if _, err := conn.Write(append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)); err != nil {
			return err.Error()
		}
		if _, err := io.ReadFull(conn, answer[:2]); err != nil {
			return err.Error()
		}
		n, err = io.ReadFull(conn, answer[:int(answer[0])<<8|int(answer[1])])
	} else {
		if _, err := conn.Write(b); err != nil {
			return err.Error()
		}
		n, err = conn.Read(answer)
	}
	if err != nil {
		return err.Error()
	}
	var m dnsmessage.Message
	if err := m.Unpack(answer[:n]); err != nil {
		return err.Error()
	}
	said := strings.TrimPrefix(m.RCode.String(), "RCode")
	for _, r := range m.Answers {
		switch body := r.Body.(type) {
		case *dnsmessage.AResource:
			said += " " + netip.AddrFrom4(body.A).String()
		case *dnsmessage.AAAAResource:
			said += " " + netip.AddrFrom16(body.AAAA).String()
		}
	}
	return said
}

// resolver is the host's: it knows www.example.test.
func resolver(t *testing.T) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, conf, "nameserver 127.0.0.53\nsearch example.test\n")
	// In the test's own mount namespace.
	if err := unix.Mount(conf, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	c, err := net.ListenPacket("udp", "127.0.0.53:53")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	go func() {
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if answer, err := resolve(b[:n]); err == nil {
				c.WriteTo(answer, from)
			}
		}
	}()
}

func resolve(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || len(m.Questions) != 1 {
		return nil, fmt.Errorf("no question: %w", err)
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	q := m.Questions[0]
	header := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60}
	switch {
	case q.Name.String() != "www.example.test.":
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AResource{A: [4]byte{198, 51, 100, 1}}}}
	case q.Type == dnsmessage.TypeAAAA:
		m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AAAAResource{AAAA: [16]byte{0x20, 1, 0x0d, 0xb8, 15: 1}}}}
	}
	return m.Pack()
}
