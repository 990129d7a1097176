package gvproxy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/usernet/usernet/internal/nettest"
)

// world is a namespace beyond the host, at 10.200.1.2.
func world(t *testing.T) {
	t.Helper()
	ns := nettest.NewNS(t)
	nettest.Veth(t, "world0", netip.MustParsePrefix("10.200.1.1/24"), ns, "eth0", netip.MustParsePrefix("10.200.1.2/24"))
	greet(t, ns.Do, "tcp", "10.200.1.2:7")
	greet(t, ns.Do, "udp", "10.200.1.2:7")
}

// The whole network of a guest with the real gvforwarder is usernet's.
func TestGuest(t *testing.T) {
	resolver(t)
	world(t)
	pid := filepath.Join(t.TempDir(), "gvproxy.pid")
	p, err := startOurs(t, "-ssh-port", "3022", "-pid-file", pid)
	if err != nil {
		t.Fatal(err)
	}
	g, bin := newGuest(t)
	lease := g.forward(t, bin, "unix://"+p.api)
	if want := "192.168.127.2/24 router=192.168.127.1 dns=192.168.127.1 mtu=1500 lease=3600 server=192.168.127.1"; lease != want {
		t.Errorf("DHCP has given %s\nwant %s", lease, want)
	}
	if text, err := p.event(patience); err != nil || text != `{"notification_type":"connection_established","mac_address":"5a:94:ef:e4:0c:ee"}`+"\n" {
		t.Errorf("notification %s, %v", text, err)
	}

	t.Run("ping", func(t *testing.T) {
		for _, to := range []string{"192.168.127.1", "192.168.127.254", "10.200.1.2"} {
			if out, err := g.command(t, "busybox", "ping", "-c", "1", "-w", "30", to); err != nil {
				t.Errorf("ping %s: %v: %s", to, err, out)
			}
		}
	})
	t.Run("out", func(t *testing.T) {
		for _, network := range []string{"tcp", "udp"} {
			conn, err := g.dial(t, network, "10.200.1.2:7")
			if who := talk(t, conn, err); who != "10.200.1.1" {
				t.Errorf("%s: the world sees %s, want the host", network, who)
			}
		}
		if _, err := g.dial(t, "tcp", "10.200.1.2:9"); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("a port that nobody listens on: %v", err)
		}
	})
	t.Run("host", func(t *testing.T) {
		for _, network := range []string{"tcp", "udp"} {
			greet(t, here, network, "127.0.0.1:4007")
			conn, err := g.dial(t, network, "192.168.127.254:4007")
			if who := talk(t, conn, err); who != "127.0.0.1" {
				t.Errorf("%s: the host's loopback sees %s", network, who)
			}
		}
		if _, err := g.dial(t, "tcp", "192.168.127.1:4007"); err == nil {
			t.Error("the gateway's own address leads to the host's loopback")
		}
	})
	t.Run("names", func(t *testing.T) { g.names(t, p.api) })
	t.Run("forwards", func(t *testing.T) { g.forwards(t, p.api) })
	t.Run("inside", func(t *testing.T) { g.inside(t, p.api) })
	t.Run("tunnel", func(t *testing.T) {
		greet(t, g.ns.Do, "tcp", "192.168.127.2:5007")
		conn := dial(t, p.api)
		if _, err := io.WriteString(conn, "POST /tunnel?ip=192.168.127.2&port=5007 HTTP/1.1\r\nHost: gateway\r\nContent-Length: 0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		ok := make([]byte, 2)
		if _, err := io.ReadFull(conn, ok); err != nil || string(ok) != "OK" {
			t.Fatalf("%q, %v", ok, err)
		}
		if who := talk(t, conn, nil); who != "192.168.127.1" {
			t.Errorf("the guest sees %s", who)
		}
	})
	t.Run("ssh", func(t *testing.T) {
		greet(t, g.ns.Do, "tcp", "192.168.127.2:22")
		conn, err := net.Dial("tcp", "127.0.0.1:3022")
		talk(t, conn, err)
	})

	if text, err := os.ReadFile(pid); err != nil || string(text) != strconv.Itoa(p.cmd.Process.Pid) {
		t.Errorf("PID file %q, %v", text, err)
	}
	p.terminate(t)
	for _, path := range []string{pid, p.api} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind: %v", path, err)
		}
	}
}

func (g *guest) names(t *testing.T, api string) {
	const crc = `{"Name":"crc.testing.","Records":[{"Name":"api","IP":"192.168.127.2"},{"Regexp":"^app-","IP":"192.168.127.2"}]}`
	if got := answers(t, api, []call{{"POST", addPath, crc, ""}}); !strings.HasPrefix(got[0], "200 OK") {
		t.Fatal(got)
	}
	for _, tt := range []struct {
		name string
		kind dnsmessage.Type
		want string
	}{
		{"gateway.containers.internal.", dnsmessage.TypeA, "Success 192.168.127.1"},
		{"host.docker.internal.", dnsmessage.TypeA, "Success 192.168.127.254"},
		{"HOST.docker.internal.", dnsmessage.TypeA, "Success 192.168.127.254"},
		{"host.docker.internal.", dnsmessage.TypeAAAA, "Success"},
		{"nobody.docker.internal.", dnsmessage.TypeA, "NameError"},
		{"api.crc.testing.", dnsmessage.TypeA, "Success 192.168.127.2"},
		{"app-1.crc.testing.", dnsmessage.TypeA, "Success 192.168.127.2"},
		{"www.example.test.", dnsmessage.TypeA, "Success 198.51.100.1"},
		{"www.example.test.", dnsmessage.TypeAAAA, "Success 2001:db8::1"},
		{"www.example.test.", dnsmessage.TypeMX, "Success"},
		{"nowhere.example.test.", dnsmessage.TypeA, "NameError"},
	} {
		if got := g.ask(t, "udp", tt.name, tt.kind); got != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.name, tt.kind, got, tt.want)
		}
	}
	if got := g.ask(t, "tcp", "gateway.docker.internal.", dnsmessage.TypeA); got != "Success 192.168.127.1" {
		t.Errorf("by TCP: %s", got)
	}
}

func (g *guest) forwards(t *testing.T, api string) {
	for _, proto := range []string{"tcp", "udp"} {
		greet(t, g.ns.Do, proto, "192.168.127.2:6007")
		expose := fmt.Sprintf(`{"local":"127.0.0.1:6443","remote":"192.168.127.2:6007","protocol":%q}`, proto)
		if got := answers(t, api, []call{{"POST", exposePath, expose, ""}}); !strings.HasPrefix(got[0], "200 OK") {
			t.Fatal(got)
		}
		conn, err := net.Dial(proto, "127.0.0.1:6443")
		if err == nil {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
		}
		if who := talk(t, conn, err); who != "192.168.127.1" {
			t.Errorf("%s: the guest sees %s, want the gateway for a client on loopback", proto, who)
		}
		unexpose := fmt.Sprintf(`{"local":"127.0.0.1:6443","protocol":%q}`, proto)
		if got := answers(t, api, []call{{"POST", unexposePath, unexpose, ""}}); !strings.HasPrefix(got[0], "200 OK") {
			t.Fatal(got)
		}
	}
	if conn, err := net.Dial("tcp", "127.0.0.1:6443"); err == nil {
		conn.Close()
		t.Error("somebody listens after unexpose")
	}
	// A client that is not on loopback is seen as itself.
	greet(t, g.ns.Do, "tcp", "192.168.127.2:6008")
	if got := answers(t, api, []call{{"POST", exposePath, `{"local":"10.200.1.1:6444","remote":"192.168.127.2:6008"}`, ""}}); !strings.HasPrefix(got[0], "200 OK") {
		t.Fatal(got)
	}
	conn, err := net.Dial("tcp", "10.200.1.1:6444")
	if err == nil {
		defer conn.Close()
	}
	if who := talk(t, conn, err); who != "10.200.1.1" {
		t.Errorf("the guest sees %s, want its client", who)
	}
}

// inside is what the guest may ask the gateway for: forwards to itself, and nothing about files and others.
func (g *guest) inside(t *testing.T, api string) {
	precious := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, body, want string }{
		{exposePath, `{"local":"127.0.0.1:7443","remote":":7007"}`, "200 OK"},
		{exposePath, `{"local":"127.0.0.1:7443","remote":":7007"}`, "200 OK"}, // its own again, as after a restart of the guest
		{exposePath, `{"local":"127.0.0.1:7443","remote":":7008"}`, "500 Internal Server Error"},
		{exposePath, `{"local":"127.0.0.1:7444","remote":"192.168.127.3:80"}`, "403 Forbidden"},
		{exposePath, `{"protocol":"unix","local":"` + precious + `","remote":"tcp://192.168.127.2:80"}`, "403 Forbidden"},
		{unexposePath, `{"local":"127.0.0.1:8443"}`, "500 Internal Server Error"}, // the host's, to another guest
		{"/services/dns/add", `{"Name":"."}`, "404 Not Found"},
		{"/tunnel?ip=192.168.127.3&port=22", ``, "404 Not Found"},
		{"/connect", ``, "404 Not Found"},
		{"/leases", ``, "404 Not Found"},
		{"/usernet/ports", ``, "404 Not Found"},
	} {
		if tt.path == unexposePath {
			answers(t, api, []call{{"POST", exposePath, `{"local":"127.0.0.1:8443","remote":"192.168.127.3:80"}`, ""}})
		}
		conn, err := g.dial(t, "tcp", "192.168.127.1:80")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: gateway.containers.internal\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s",
			tt.path, len(tt.body), tt.body); err != nil {
			t.Fatal(err)
		}
		if got := answer(conn, "POST"); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s %s: %s, want %s", tt.path, tt.body, got, tt.want)
		}
	}
	if text, err := os.ReadFile(precious); err != nil || string(text) != "precious" {
		t.Errorf("the file on the host: %q, %v", text, err)
	}
	greet(t, g.ns.Do, "tcp", "192.168.127.2:7007")
	conn, err := net.Dial("tcp", "127.0.0.1:7443")
	talk(t, conn, err)
	if got := answers(t, api, []call{{"GET", allPath, "", ""}}); !strings.Contains(got[0], `"local":"127.0.0.1:8443"`) {
		t.Errorf("the host's forward is gone: %s", got)
	}
}

// usernet gateway itself: machines at a socket of their own, which the API is not behind, a port of the first one, IPv6.
func TestGateway(t *testing.T) {
	vm := filepath.Join(t.TempDir(), "vm.sock")
	usernet := filepath.Join(filepath.Dir(ours(t)), "usernet")
	p, err := startUsernet(t, usernet, "-listen-vm", "unix://"+vm, "-p", "127.0.0.1:8080:8007")
	if err != nil {
		t.Fatal(err)
	}
	g, bin := newGuest(t)
	g.forward(t, bin, "unix://"+vm)
	greet(t, g.ns.Do, "tcp", "192.168.127.2:8007")
	conn, err := net.Dial("tcp", "127.0.0.1:8080")
	talk(t, conn, err)
	for _, c := range []call{{"GET", allPath, "", ""}, {"POST", exposePath, `{"local":":1","remote":":1"}`, ""}, {"GET", "/usernet/ports", "", ""}} {
		if got := answers(t, vm, []call{c}); !strings.HasPrefix(got[0], "404 ") {
			t.Errorf("%s where machines come: %s", c.path, got)
		}
	}

	greet(t, here, "tcp", "[::1]:4007")
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // the guest makes its address, and looks for others with it
		conn, err := g.dial(t, "tcp", "[fd75:6e65:74:7f::fe]:4007")
		if err == nil {
			if who := talk(t, conn, nil); who != "::1" {
				t.Errorf("the host's loopback sees %s", who)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("IPv6: %v", err)
			break
		}
	}

	out, err := exec.Command(usernet, "gateway", "ports", "-services", "unix://"+p.api).CombinedOutput()
	want := "PROTOCOL  HOST            LEADS TO            CONNECTIONS\n" +
		"tcp       127.0.0.1:8080  192.168.127.2:8007  \n"
	if err != nil || string(out) != want {
		t.Errorf("ports: %v\n%s\nwant\n%s", err, out, want)
	}
	p.terminate(t)
	if _, err := os.Stat(vm); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left behind: %v", vm, err)
	}
}

// The guest is on the network again after the gateway was killed, with what it had, and so after itself.
func TestGuestReconnects(t *testing.T) {
	p, err := start(t, ours(t), "-ssh-port", "-1")
	defer p.stop()
	if err != nil {
		t.Fatal(err)
	}
	g, bin := newGuest(t)
	g.forward(t, bin, "unix://"+p.api)
	p.stop()
	again := exec.Command(ours(t), "-listen", "unix://"+p.api, "-ssh-port", "-1")
	again.Stderr = t.Output()
	run(t, again)
	defer func() {
		again.Process.Kill()
		again.Wait()
	}()
	// gvforwarder tries once a second, and asks DHCP again.
	deadline := time.Now().Add(patience)
	for {
		out, err := g.command(t, "busybox", "ping", "-c", "1", "-w", "2", "192.168.127.1")
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after a restart of the gateway: %v: %s", err, out)
		}
	}
}

// What the program says by its exit status.
func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	api := listen(t, filepath.Join(dir, "api"))
	for _, tt := range []struct {
		args   string
		status int
		says   string
	}{
		{"-version", 0, "gvproxy version "},
		{"-help", 0, "-listen-qemu"},
		{"-nope", 2, "not defined: -nope"},
		{"-ssh-port 80", 1, "want 1024 to 65535"},
		{fmt.Sprintf("-ssh-port %d", taken.Addr().(*net.TCPAddr).Port), 1, "address already in use"},
		{"-listen unix://" + api.Addr().String(), 1, "another process listens on it"},
		{"-listen-qemu unix://" + api.Addr().String(), 1, "another process listens on it"},
		{"-listen-stdio accept", 0, ""}, // its input has ended
	} {
		cmd := exec.Command(ours(t), strings.Fields(tt.args)...)
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != tt.status || !strings.Contains(said.String(), tt.says) {
			t.Errorf("%s: status %d, want %d and %q: %s", tt.args, got, tt.status, tt.says, &said)
		}
	}
}
