package driver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/vsock/publish"
)

// gatewaySocket is set for a process that is the gateway of a test.
const gatewaySocket = "USERNET_TEST_GATEWAY"

// gatewayMain serves guests on the unix socket until it is killed.
func gatewayMain(path string) int {
	l, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	err = http.Serve(l, publish.NewServer(publish.ServerConfig{Log: slog.New(slog.DiscardHandler)}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// outside is the host of the virtual machine that the test's namespace pretends to be, with a gateway on it.
type outside struct {
	t    *testing.T
	ns   *netns.NS
	path string
	stop func() // kills the gateway
}

// farClient is an address of a client that reaches the host.
const farClient = "192.0.2.7"

func newOutside(t *testing.T) *outside {
	t.Helper()
	o := &outside{t: t, ns: nettest.NewNS(t), path: filepath.Join(t.TempDir(), "gateway.sock"), stop: func() {}}
	nettest.Handle(t, o.ns, func(h *netlink.Handle) error {
		return nettest.Addr(h, "lo", netip.MustParsePrefix(farClient+"/32"))
	})
	o.start()
	t.Cleanup(func() { o.stop() })
	return o
}

func (o *outside) start() {
	o.t.Helper()
	os.Remove(o.path)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), gatewaySocket+"="+o.path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		o.t.Fatal(err)
	}
	if err := o.ns.Do(cmd.Start); err != nil {
		o.t.Fatal(err)
	}
	o.stop = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		o.stop()
		o.t.Fatalf("the gateway: %q, %v", line, err)
	}
}

// ask is what a client at the host is answered by a port of it; "" if it cannot connect.
func (o *outside) ask(network string, port uint16) string {
	var conn net.Conn
	err := o.ns.Do(func() (err error) {
		d := net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(farClient)}}
		if network == "udp" {
			d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(farClient)}
		}
		conn, err = d.Dial(network, netip.AddrPortFrom(netip.MustParseAddr(farClient), port).String())
		return err
	})
	if err != nil {
		return ""
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintln(conn, "who am I?")
	text := make([]byte, 100)
	n, _ := conn.Read(text)
	return string(text[:n])
}

// take binds a port of the host until the test's end, or until it is closed.
func (o *outside) take(port uint16) (l net.Listener) {
	o.t.Helper()
	err := o.ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { l.Close() })
	return l
}

func newGatewayBench(t *testing.T) (*bench, *outside) {
	o := newOutside(t)
	b := newBench(t)
	b.close()
	b.gateway = o.client()
	b.open()
	return b, o
}

func (o *outside) client() *publish.Client {
	return publish.NewClient(publish.ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", o.path)
		},
		Name: "unix://gateway.sock",
		Log:  slog.New(slog.NewTextHandler(logTo{o.t}, nil)),
	})
}

func (b *bench) runGateway() {
	run, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- b.gateway.Run(run) }()
	b.leave = func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Error(err)
		}
		b.leave = nil
	}
}

// tellClients has port 80 of a container tell clients of both protocols who they are.
func tellClients(t *testing.T, ns *netns.NS) {
	t.Helper()
	var l net.Listener
	var u net.PacketConn
	err := ns.Do(func() (err error) {
		if l, err = net.Listen("tcp4", ":80"); err != nil {
			return err
		}
		u, err = net.ListenPacket("udp4", ":80")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	t.Cleanup(func() { l.Close(); u.Close(); running.Wait() })
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			// Its end may not come through any more: the container goes as soon as there is an answer.
			c.SetDeadline(time.Now().Add(10 * time.Second))
			bufio.NewReader(c).ReadString('\n')
			fmt.Fprint(c, c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	})
	running.Go(func() {
		b := make([]byte, 100)
		for {
			_, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			fmt.Fprint(&answer{u, from}, from.(*net.UDPAddr).IP)
		}
	})
}

type answer struct {
	conn net.PacketConn
	to   net.Addr
}

func (a *answer) Write(b []byte) (int, error) { return a.conn.WriteTo(b, a.to) }

// beyondState is what the table says of the ports on the host, in one line.
func (b *bench) beyondState() string {
	var s []string
	for _, n := range b.Status() {
		for _, e := range n.Endpoints {
			for _, p := range e.Ports {
				switch {
				case !p.Beyond:
					s = append(s, fmt.Sprintf("%s: %s", p.Port, p.Err))
				default:
					s = append(s, fmt.Sprintf("%s beyond: %s", p.Port, p.BeyondErr))
				}
			}
		}
	}
	return strings.Join(s, "\n")
}

func eventually(t *testing.T, want string, got func() string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		s := got()
		if s == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %q, want %q", s, want)
		}
	}
}

func TestHostGateway(t *testing.T) {
	for mode, who := range map[usernet.Mode]string{usernet.Usermode: farClient, usernet.Bridge: "10.200.1.1"} {
		t.Run(string(mode), func(t *testing.T) {
			b, o := newGatewayBench(t)
			a := b.attachment(netOf(mode, 1), "www", 2)
			datagrams := tcp(5353, 80)
			datagrams.Proto = usernet.UDP
			a.Ports = []usernet.Port{tcp(8080, 80), datagrams}
			tellClients(t, a.Netns)
			b.attach(a)
			const up = "8080:80/tcp beyond: \n5353:80/udp beyond: "
			works := func() {
				t.Helper()
				eventually(t, up, b.beyondState)
				if got := o.ask("tcp", 8080); got != who {
					t.Errorf("over TCP the container sees %q, want %q", got, who)
				}
				if got := o.ask("udp", 5353); got != who {
					t.Errorf("over UDP the container sees %q, want %q", got, who)
				}
			}
			works()
			// The gateway is killed, and comes back.
			o.stop()
			eventually(t, "", func() string { return o.ask("tcp", 8080) })
			eventually(t, "true", func() string {
				return fmt.Sprint(strings.Contains(b.beyondState(), "beyond: host gateway unix://gateway.sock: "))
			})
			if !listening(8080) {
				t.Error("without the gateway the port is not open here either")
			}
			o.start()
			works()
			// So is the daemon.
			b.restart()
			works()
			b.detach(a)
			if got := o.ask("tcp", 8080); got != "" {
				t.Errorf("after the container is gone, the port answers %q", got)
			}
			b.gone()
		})
	}
}

func TestHostGatewayConflict(t *testing.T) {
	b, o := newGatewayBench(t)
	o.take(8080)
	o.take(9000)
	a := b.attachment(netOf(usernet.Usermode, 1), "www", 2)
	a.Ports = []usernet.Port{tcp(8079, 80), tcp(8080, 80)}
	const reason = "port 8080 is taken on the host: listen tcp4 0.0.0.0:8080: bind: address already in use"
	_, err := b.Attach(ctx, a)
	if err == nil || err.Error() != reason || !errors.Is(err, usernet.ErrPortTaken) {
		t.Errorf("attach: %v, want %q", err, reason)
	}
	b.gone()
	if listening(8079) || listening(8080) || o.ask("tcp", 8079) != "" {
		t.Error("ports of the container that has failed are left")
	}

	// What is free on one side only is passed over.
	here, err := net.Listen("tcp4", ":9001")
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	wide := tcp(9000, 80)
	wide.HostPortEnd = 9003
	a.Ports = []usernet.Port{wide, tcp(0, 80)}
	tellClients(t, a.Netns)
	b.attach(a)
	var free usernet.Port
	for _, e := range b.Status()[0].Endpoints {
		if p := e.Ports[0]; p.HostPort != 9002 || p.BeyondErr != "" {
			t.Errorf("of 9000-9003, 9002 is free: %+v", p)
		}
		free = e.Ports[1].Port
	}
	for _, port := range []uint16{9002, free.HostPort} {
		if got := o.ask("tcp", port); got != farClient {
			t.Errorf("port %d: the container sees %q", port, got)
		}
	}
	b.detach(a)
	b.gone()
}

// A gateway that is away fails what is new, soon and in one sentence, and nothing that is there.
func TestHostGatewayAway(t *testing.T) {
	b, o := newGatewayBench(t)
	o.stop()
	a := b.attachment(netOf(usernet.Usermode, 1), "www", 2)
	a.Ports = []usernet.Port{tcp(8080, 80)}
	start := time.Now()
	_, err := b.Attach(ctx, a)
	if want := "host gateway unix://gateway.sock: dial unix " + o.path + ": connect: connection refused"; err == nil || err.Error() != want {
		t.Errorf("attach: %v, want %q", err, want)
	}
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("it took %s", d)
	}
	b.gone()
	if listening(8080) {
		t.Error("the port is left open")
	}

	// A port that the host gave to somebody else meanwhile comes back when that has gone.
	o.start()
	b.attach(a)
	o.stop()
	b.close()
	blocker := o.take(8080)
	o.start()
	b.open()
	const lost = "8080:80/tcp beyond: port 8080 is taken on the host: listen tcp4 0.0.0.0:8080: bind: address already in use"
	eventually(t, lost, b.beyondState)
	blocker.Close()
	eventually(t, "8080:80/tcp beyond: ", b.beyondState)
	b.detach(a)
	b.gone()
}
