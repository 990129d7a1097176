package gateway

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

// running is a gateway that is ready.
type running struct {
	*Gateway
	dir  string
	next func() (event, mac string)
	stop func() error // ends it and returns what Run has returned; may be called again
	done <-chan struct{}
}

// start runs a gateway with sockets in a directory, until the test is over.
func start(t *testing.T, change func(c *Config, dir string)) *running {
	t.Helper()
	dir := t.TempDir()
	c := fromArgs(t, "-ssh-port -1")
	c.Hypervisors.Linger = 0
	c.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	r := &running{dir: dir}
	c.Notify, r.next = events(t)
	change(&c, dir)
	var err error
	if r.Gateway, err = New(c); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	r.done = done
	go func() {
		err = r.Run(ctx)
		close(done)
	}()
	r.stop = func() error {
		cancel()
		<-done
		return err
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	if event, _ := r.next(); event != "ready" {
		t.Fatalf("event %s before ready", event)
	}
	return r
}

func parse(t testing.TB, url string) vsock.Addr {
	t.Helper()
	a, err := vsock.Parse(url)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func dialUnix(t testing.TB, network, path, local string) *net.UnixConn {
	t.Helper()
	var from *net.UnixAddr
	if local != "" {
		from = &net.UnixAddr{Name: local, Net: network}
	}
	conn, err := net.DialUnix(network, from, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

var (
	machineMAC = l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	gatewayMAC = l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd}
)

// arpRequest asks who has the gateway's address.
func arpRequest(from l2.MAC) l2.Frame {
	b := append(bytes.Repeat([]byte{0xff}, 6), from[:]...)
	b = append(b, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1)
	b = append(b, from[:]...)
	b = append(b, 192, 168, 127, from[5]&0x0f)
	b = append(b, 0, 0, 0, 0, 0, 0, 192, 168, 127, 1)
	return l2.Frame{Head: b}
}

// meet exchanges a frame with the gateway: ARP.
func meet(t *testing.T, link *l2.Link) {
	t.Helper()
	meetAs(t, link, machineMAC)
}

func meetAs(t *testing.T, link *l2.Link, mac l2.MAC) {
	t.Helper()
	if _, err := link.Send([]l2.Frame{arpRequest(mac)}); err != nil {
		t.Fatal(err)
	}
	for {
		frames, err := link.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for i := range frames {
			var b []byte
			b = append(b, frames[i].Head...)
			for _, tail := range frames[i].Tail {
				b = append(b, tail...)
			}
			if len(b) >= 42 && binary.BigEndian.Uint16(b[12:]) == 0x0806 && b[21] == 2 {
				if l2.MAC(b[22:28]) != gatewayMAC {
					t.Errorf("the gateway has %x", b[22:28])
				}
				return
			}
		}
	}
}

// request sends a request head on a connection.
func request(t *testing.T, conn net.Conn, path string) {
	t.Helper()
	if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: gateway\r\nContent-Length: 0\r\n\r\n", path); err != nil {
		t.Fatal(err)
	}
}

func vpnkitHandshake(t *testing.T, conn net.Conn) {
	t.Helper()
	hello := append([]byte("VMN3T"), make([]byte, 44)...)
	if _, err := conn.Write(hello); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, hello); err != nil {
		t.Fatal(err)
	}
	command := append([]byte{1}, "C3D68012-0208-11EA-9FD7-F2189899AB08"...)
	if _, err := conn.Write(append(command, 0, 0, 0, 0)); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 258)
	if _, err := io.ReadFull(conn, reply); err != nil {
		t.Fatal(err)
	}
	if l2.MAC(reply[5:11]) != machineMAC || binary.LittleEndian.Uint16(reply[1:]) != 1500 {
		t.Errorf("HyperKit is told %x", reply[:11])
	}
}

// A second gateway is refused at each socket of the first, which goes on.
func TestSecondGateway(t *testing.T) {
	r := start(t, everyDoor(t))
	machine := l2.Stream(dialUnix(t, "unix", r.dir+"/qemu", ""), l2.Options{Framing: l2.QEMU})
	meet(t, machine)
	peer, err := l2.Packets(dialUnix(t, "unixgram", r.dir+"/vfkit", t.TempDir()+"/vm"), l2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	for name, change := range map[string]func(c *Config){
		"api":    func(c *Config) { c.Listen = []vsock.Addr{parse(t, "unix://"+r.dir+"/api")} },
		"qemu":   func(c *Config) { c.Hypervisors.QEMU = []vsock.Addr{parse(t, "unix://"+r.dir+"/qemu")} },
		"vpnkit": func(c *Config) { c.Hypervisors.VPNKit = []vsock.Addr{parse(t, "unix://"+r.dir+"/vpnkit")} },
		"bess":   func(c *Config) { c.Hypervisors.Packets = []string{r.dir + "/bess"} },
		"vfkit":  func(c *Config) { c.Hypervisors.Datagrams = []string{r.dir + "/vfkit"} },
		"hybrid": func(c *Config) { c.Machines = []vsock.Addr{parse(t, "hybrid://"+r.dir+"/vm:1024")} },
	} {
		c := fromArgs(t, "-ssh-port -1")
		c.Log = slog.New(slog.DiscardHandler)
		c.PIDFile = r.dir + "/pid"
		change(&c)
		g, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Run(t.Context()); !errors.Is(err, vsock.ErrInUse) {
			t.Errorf("%s: %v, want that it is in use", name, err)
		}
	}
	meet(t, machine)
	if _, err := os.Stat(r.dir + "/pid"); err != nil {
		t.Errorf("the first one's PID file: %v", err)
	}
}

// What a gateway that was killed has left is replaced.
func TestAfterKill(t *testing.T) {
	leave := func(network, path string) {
		var c interface{ Close() error }
		var err error
		if network == "unixgram" {
			c, err = net.ListenUnixgram(network, &net.UnixAddr{Name: path, Net: network})
		} else {
			var l *net.UnixListener
			l, err = net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
			l.SetUnlinkOnClose(false)
			c = l
		}
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	r := start(t, func(c *Config, dir string) {
		for name, network := range map[string]string{"qemu": "unix", "api": "unix", "bess": "unixpacket", "vfkit": "unixgram"} {
			leave(network, filepath.Join(dir, name))
		}
		if err := os.WriteFile(dir+"/pid", []byte("1"), 0o600); err != nil {
			t.Fatal(err)
		}
		everyDoor(t)(c, dir)
	})
	meet(t, l2.Stream(dialUnix(t, "unix", r.dir+"/qemu", ""), l2.Options{Framing: l2.QEMU}))
	for _, name := range []string{"qemu", "api", "bess", "vfkit", "vpnkit", "services", "vm_1024"} {
		if st, err := os.Stat(filepath.Join(r.dir, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	if text, err := os.ReadFile(r.dir + "/pid"); err != nil || string(text) != strconv.Itoa(os.Getpid()) {
		t.Errorf("PID file %q, %v", text, err)
	}
}

// A hypervisor's socket that cannot be had is told of, also by notification, and everything else goes away again.
func TestHypervisorError(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	nettest.NoLeaks(t)
	dir := t.TempDir()
	c := fromArgs(t, "-ssh-port -1")
	c.Log = slog.New(slog.DiscardHandler)
	path, next := events(t)
	c.Notify = path
	everyDoor(t)(&c, dir)
	c.Hypervisors.Datagrams = []string{dir + "/nowhere/vfkit"}
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Run(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want that the directory is missing", err)
	}
	if event, _ := next(); event != "hypervisor_error" {
		t.Errorf("event %s", event)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

func TestStdio(t *testing.T) {
	in, toMachine, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fromMachine, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r := start(t, func(c *Config, _ string) { c.Hypervisors.In, c.Hypervisors.Out = in, out })
	link := l2.Files(fromMachine, toMachine, l2.Options{Framing: l2.HyperKit})
	meet(t, link)
	if err := link.Close(); err != nil {
		t.Error(err)
	}
	r.over(t)
}

// over fails unless the gateway ends by itself, without an error.
func (r *running) over(t *testing.T) {
	t.Helper()
	select {
	case <-r.done:
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("the gateway goes on")
	}
}

func TestLastMachineLeaves(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket", "unixgram"} {
		t.Run(network, func(t *testing.T) {
			r := start(t, func(c *Config, dir string) {
				everyDoor(t)(c, dir)
				c.Hypervisors.Linger = 50 * time.Millisecond
			})
			// One that comes to /connect does not count.
			guest := dialUnix(t, "unix", r.dir+"/api", "")
			request(t, guest, "/connect")
			meetAs(t, l2.Stream(guest, l2.Options{Framing: l2.HyperKit}), l2.MAC{2, 0, 0, 0, 0, 5})
			name, local := map[string]string{"unix": "qemu", "unixpacket": "bess", "unixgram": "vfkit"}[network], ""
			if network == "unixgram" {
				local = t.TempDir() + "/vm"
			}
			conn := dialUnix(t, network, filepath.Join(r.dir, name), local)
			if network == "unix" {
				meet(t, l2.Stream(conn, l2.Options{Framing: l2.QEMU}))
			} else {
				link, err := l2.Packets(conn, l2.Options{})
				if err != nil {
					t.Fatal(err)
				}
				meet(t, link)
			}
			conn.Close()
			r.over(t)
		})
	}
}

func TestCapture(t *testing.T) {
	r := start(t, func(c *Config, dir string) {
		everyDoor(t)(c, dir)
		c.Capture = dir + "/frames.pcap"
	})
	meet(t, l2.Stream(dialUnix(t, "unix", r.dir+"/qemu", ""), l2.Options{Framing: l2.QEMU}))
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	text, err := os.ReadFile(r.dir + "/frames.pcap")
	if err != nil || !bytes.Contains(text, arpRequest(machineMAC).Head) {
		t.Errorf("captured %d bytes without the request, %v", len(text), err)
	}
}

// get asks an API at a unix socket.
func get(t *testing.T, socket, path string) (status int, body string) {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	res, err := (&http.Client{Transport: tr, Timeout: patience}).Get("http://gateway" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(text)
}

// Who may ask for what, by listener.
func TestWhoMay(t *testing.T) {
	r := start(t, func(c *Config, dir string) {
		everyDoor(t)(c, dir)
		c.Listen = append(c.Listen, parse(t, "hybrid://"+dir+"/vm:1025"))
		c.Profile = true
	})
	for _, tt := range []struct {
		path                    string
		api, services, machines int
	}{
		{"/services/forwarder/all", 200, 200, 404},
		{"/services/dns/all", 200, 200, 404},
		{"/leases", 200, 200, 404},
		{"/stats", 200, 200, 404},
		{"/tunnel", 500, 500, 404},
		{PortsPath, 200, 200, 404},
		{"/connect/usernet", 426, 404, 426},
		{"/debug/pprof/cmdline", 200, 404, 404},
		{"/", 404, 404, 404},
	} {
		for socket, want := range map[string]int{"api": tt.api, "services": tt.services, "vm_1024": tt.machines, "vm_1025": tt.machines} {
			if got, body := get(t, filepath.Join(r.dir, socket), tt.path); got != want {
				t.Errorf("%s at %s: %d %s, want %d", tt.path, socket, got, body, want)
			}
		}
	}
	if _, body := get(t, r.dir+"/api", "/leases"); body != `{"192.168.127.1":"5a:94:ef:e4:0c:dd","192.168.127.2":"5a:94:ef:e4:0c:ee"}`+"\n" {
		t.Errorf("leases %s", body)
	}
	if _, body := get(t, r.dir+"/services", PortsPath); body != "[]\n" {
		t.Errorf("published ports %s", body)
	}
}

func TestForwardsAtTheStart(t *testing.T) {
	r := start(t, func(c *Config, dir string) {
		everyDoor(t)(c, dir)
		c.Forwards = append(c.Forwards, tcp(t, "127.0.0.1:2222", "192.168.127.2:22"))
	})
	conn, err := net.Dial("tcp", "127.0.0.1:2222")
	if err != nil {
		t.Errorf("podman machine's test: %v", err)
	} else {
		conn.Close()
	}
	if got := r.Forwards(); len(got) != 1 || got[0].Target != netip.MustParseAddrPort("192.168.127.2:22") {
		t.Errorf("forwards %v", got)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("tcp", "127.0.0.1:2222"); err == nil {
		conn.Close()
		t.Error("somebody listens after the end")
	}
}
