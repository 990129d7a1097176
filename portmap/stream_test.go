package portmap

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock/proxy"
	"github.com/usernet/usernet/vsock/publish"
)

// streamPair is a stream between virtual machine and host: our end, and the host's.
func streamPair(t *testing.T) (ours, hosts *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	if hosts, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); hosts.Close() })
	hosts.SetDeadline(time.Now().Add(10 * time.Second))
	return ours, hosts
}

// redirecting is a Dialer that reaches an address whatever it is asked for, and remembers the question.
type redirecting struct {
	to     netip.AddrPort
	client chan netip.AddrPort
	target chan netip.AddrPort
}

func newRedirecting(to net.Addr) *redirecting {
	return &redirecting{netip.MustParseAddrPort(to.String()), make(chan netip.AddrPort, 8), make(chan netip.AddrPort, 8)}
}

func (d *redirecting) StartTCP(client, target netip.AddrPort) (int, error) {
	d.client <- client
	d.target <- target
	return Host{}.StartTCP(client, d.to)
}

func (d *redirecting) DialUDP(client, target netip.AddrPort) (int, error) {
	d.client <- client
	d.target <- target
	return Host{}.DialUDP(client, d.to)
}

var fromHost = proxy.Header{Client: netip.MustParseAddrPort("192.0.2.7:4711"), Target: netip.MustParseAddrPort("198.51.100.1:8080")}

func TestAcceptTCP(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := newRedirecting(l.Addr())
	f := mustPublish(t, newMapper(t), usernet.Port{Proto: usernet.TCP, ContainerPort: 80}, d)
	ours, hosts := streamPair(t)
	f.Accept(fromHost, ours)
	inside, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	inside.SetDeadline(time.Now().Add(10 * time.Second))
	if c, at := <-d.client, <-d.target; c != fromHost.Client || at != netip.AddrPortFrom(container, 80) {
		t.Errorf("dialled %s for %s", at, c)
	}
	io.WriteString(hosts, "question")
	hosts.CloseWrite()
	if b, err := io.ReadAll(inside); string(b) != "question" || err != nil {
		t.Errorf("the container reads %q, %v", b, err)
	}
	io.WriteString(inside, "answer")
	inside.Close()
	if b, err := io.ReadAll(hosts); string(b) != "answer" || err != nil {
		t.Errorf("the host reads %q, %v", b, err)
	}

	// Close cuts what is being relayed, and what comes later.
	ours, hosts = streamPair(t)
	f.Accept(fromHost, ours)
	if inside, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	inside.SetDeadline(time.Now().Add(10 * time.Second))
	closeSoon(t, f)
	if _, err := io.ReadAll(inside); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("after Close the container reads %v, want a reset", err)
	}
	if _, err := io.ReadAll(hosts); err != nil {
		t.Error(err)
	}
	ours, hosts = streamPair(t)
	f.Accept(fromHost, ours)
	if b, err := io.ReadAll(hosts); len(b) > 0 || err != nil {
		t.Errorf("a stream for a closed port: %q, %v", b, err)
	}
	if n := f.Stats().Active; n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

func TestAcceptRefuses(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // nobody is there any more
	f := mustPublish(t, newMapper(t), usernet.Port{Proto: usernet.TCP, ContainerPort: 80}, newRedirecting(l.Addr()))
	ours, hosts := streamPair(t)
	f.Accept(fromHost, ours)
	if b, err := io.ReadAll(hosts); len(b) > 0 || err != nil {
		t.Errorf("the host reads %q, %v", b, err)
	}
	here, there := net.Pipe()
	f.Accept(fromHost, there)
	if _, err := here.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("what is no socket: %v", err)
	}
	if s := f.Stats(); s.Active != 0 || s.Refused != 2 {
		t.Errorf("%+v", s)
	}
}

func TestAcceptUDP(t *testing.T) {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	d := newRedirecting(c.LocalAddr())
	f := mustPublish(t, newMapper(t), usernet.Port{Proto: usernet.UDP, ContainerPort: 80}, d)
	ours, hosts := streamPair(t)
	h := fromHost
	h.Datagram = true
	f.Accept(h, ours)
	r, b := bufio.NewReader(hosts), make([]byte, publish.MaxDatagram)
	for _, text := range []string{"one", "", "three"} {
		hosts.Write(publish.AppendDatagram(nil, []byte(text)))
		n, from, err := c.ReadFrom(b)
		if err != nil || string(b[:n]) != text {
			t.Fatalf("the container reads %q, %v", b[:n], err)
		}
		c.WriteTo([]byte(text+"!"), from)
		if n, err = publish.ReadDatagram(r, b); err != nil || string(b[:n]) != text+"!" {
			t.Fatalf("the host reads %q, %v", b[:n], err)
		}
	}
	if got := <-d.client; got != h.Client {
		t.Errorf("dialled for %s", got)
	}
	if s := f.Stats(); s.Active != 1 || s.Accepted != 1 {
		t.Errorf("%+v", s)
	}
	closeSoon(t, f)
	if _, err := publish.ReadDatagram(r, b); err != io.EOF {
		t.Errorf("after Close: %v", err)
	}
	ours, hosts = streamPair(t)
	f.Accept(h, ours)
	if b, err := io.ReadAll(hosts); len(b) > 0 || err != nil {
		t.Errorf("a flow for a closed port: %q, %v", b, err)
	}
	if s := f.Stats(); s.Active != 0 {
		t.Errorf("%+v", s)
	}
}
