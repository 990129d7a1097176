package driver

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// attachment puts a new container of its own on n.
func (b *bench) attachment(n usernet.Network, name string, last byte) Attachment {
	b.t.Helper()
	net4 := n.Subnets[0].Prefix.Addr().As4()
	net4[3] = last
	return Attachment{
		Network: n, NetworkName: "web",
		Endpoint:  usernet.Endpoint{ID: id('0' + last%10), IfName: "eth0"},
		Container: Container{ID: id('c'), Name: name, Aliases: []string{"alias"}},
		Netns:     nettest.NewNS(b.t),
		Addresses: []netip.Addr{netip.AddrFrom4(net4)},
	}
}

func (b *bench) attach(a Attachment) Attached {
	b.t.Helper()
	got, err := b.Attach(ctx, a)
	if err != nil {
		b.t.Fatal(err)
	}
	return got
}

func (b *bench) detach(a Attachment) {
	b.t.Helper()
	if err := b.Detach(ctx, a.Network.ID, a.Endpoint.ID, a.Netns); err != nil {
		b.t.Fatal(err)
	}
}

// gone waits until no network is left: a transient one goes in its own time.
func (b *bench) gone() {
	b.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); b.status() != ""; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatalf("still there:\n%s", b.status())
		}
	}
}

func inside(t *testing.T, ns *netns.NS, command string) string {
	t.Helper()
	var out []byte
	err := ns.Do(func() (err error) {
		f := strings.Fields(command)
		out, err = exec.Command(f[0], f[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

func TestAttach(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			n := netOf(mode, 1)
			n.IPv6 = true
			n.Subnets = append(n.Subnets, usernet.Subnet{Prefix: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")},
				usernet.Subnet{Prefix: netip.MustParsePrefix("10.201.1.0/24"), Gateway: netip.MustParseAddr("10.201.1.1")})
			a := b.attachment(n, "www", 2)
			a.Addresses = append(a.Addresses, netip.MustParseAddr("fd00:1::2"), netip.MustParseAddr("10.201.1.2"))
			a.Routes = []Route{{Destination: netip.MustParsePrefix("10.99.0.0/16"), NextHop: netip.MustParseAddr("10.200.1.9"), Metric: 7},
				{Destination: netip.MustParsePrefix("10.98.0.0/16"), Kind: 7}} // unreachable
			a.Ports = []usernet.Port{tcp(8080, 80)}
			got := b.attach(a)
			want := "[10.200.1.2/24 fd00:1::2/64 10.201.1.2/24] [10.200.1.1 fd00:1::1 10.201.1.1] 02:42:0a:c8:01:02"
			if s := fmt.Sprint(got.Addresses, got.Gateways, got.Endpoint.MAC); s != want {
				t.Errorf("attached: %s, want %s", s, want)
			}
			for _, look := range []struct{ command, want string }{
				{"ip addr show eth0", "10.200.1.2/24"}, {"ip addr show eth0", "10.201.1.2/24"}, {"ip addr show eth0", "fd00:1::2/64"},
				{"ip addr show eth0", "02:42:0a:c8:01:02"}, {"ip link show eth0", "state UP"},
				{"ip route", "default via 10.200.1.1 dev eth0 metric 101"}, {"ip -6 route", "default via fd00:1::1 dev eth0 metric 101"},
				{"ip route", "10.99.0.0/16 via 10.200.1.9 dev eth0 metric 7"}, {"ip route", "unreachable 10.98.0.0/16"},
				{"ip rule", "from 10.200.1.2 lookup"}, {"ip -6 rule", "from fd00:1::2 lookup"},
				{"ping -c 1 -W 2 10.200.1.1", "1 received"}, {"ping -c 1 -W 2 fd00:1::1", "1 received"},
			} {
				if out := inside(t, a.Netns, look.command); !strings.Contains(out, look.want) {
					t.Errorf("%s: want %q in\n%s", look.command, look.want, out)
				}
			}
			if got := b.status(); !strings.Contains(got, "8080:80/tcp") {
				t.Errorf("status %s", got)
			}
			if e, err := b.FindEndpoint(ctx, "www"); err != nil || e.ID != a.Endpoint.ID {
				t.Errorf("find the endpoint by its container's name: %v, %v", e, err)
			}
			before := b.status()
			b.restart()
			if got := b.status(); got != before {
				t.Errorf("after a restart %s, before %s", got, before)
			}
			b.attach(a) // once more
			if got := b.status(); got != before {
				t.Errorf("after a repetition %s, before %s", got, before)
			}
			b.detach(a)
			b.detach(a)
			b.gone()
			if out := inside(t, a.Netns, "ip rule"); strings.Contains(out, "10.20") {
				t.Errorf("rules are left: %s", out)
			}
			if out := inside(t, a.Netns, "ip link"); strings.Contains(out, "eth0") {
				t.Errorf("the link is left: %s", out)
			}
		})
	}
}

func TestAttachRefuses(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	first := b.attachment(n, "first", 2)
	b.attach(first)
	defer b.detach(first)
	before := b.status()
	changed := func(change func(a *Attachment)) Attachment {
		a := b.attachment(n, "bad", 3)
		a.Container.ID = id('d')
		change(&a)
		return a
	}
	other := netOf(usernet.Usermode, 1)
	other.Options.MTU = 1300
	for _, tt := range []struct {
		name string
		a    Attachment
		want error
		text string
	}{
		{"foreign address", changed(func(a *Attachment) { a.Addresses = []netip.Addr{netip.MustParseAddr("10.9.9.9")} }), usernet.ErrInvalid, "10.9.9.9"},
		{"the gateway", changed(func(a *Attachment) { a.Addresses = []netip.Addr{netip.MustParseAddr("10.200.1.1")} }), usernet.ErrInvalid, "gateway"},
		{"an address twice", changed(func(a *Attachment) { a.Addresses = first.Addresses }), usernet.ErrExists, "10.200.1.2"},
		{"other settings", changed(func(a *Attachment) { a.Network = other }), usernet.ErrExists, "other settings"},
		{"interface that is there", changed(func(a *Attachment) { a.Endpoint.IfName = "lo" }), os.ErrExist, "lo"},
		{"route to nowhere", changed(func(a *Attachment) {
			a.Routes = []Route{{Destination: netip.MustParsePrefix("10.99.0.0/16"), NextHop: netip.MustParseAddr("192.0.2.1")}}
		}), nil, "10.99.0.0/16"},
		{"port without a target", changed(func(a *Attachment) { a.Ports = []usernet.Port{tcp(8080, 80), tcp(8081, 0)} }), usernet.ErrInvalid, "8081"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := b.Attach(ctx, tt.a)
			if err == nil || !strings.Contains(err.Error(), tt.text) || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v with %q", err, tt.want, tt.text)
			}
			if got := b.status(); got != before {
				t.Errorf("status %s, before %s", got, before)
			}
		})
	}
	if listening(8080) {
		t.Error("a port of a refused container is served")
	}
}

// A network that its engine removed and made again, in other terms, takes the place of the old one as soon as that has
// nobody on it.
func TestAttachAfterAnotherNetworkOfThatID(t *testing.T) {
	b := newBench(t)
	for mtu := range 3 {
		n := netOf(usernet.Usermode, 1)
		n.Options.MTU = 1300 + mtu
		a := b.attachment(n, "www", 2)
		b.attach(a)
		if out := inside(t, a.Netns, "ip link show eth0"); !strings.Contains(out, fmt.Sprintf("mtu %d", 1300+mtu)) {
			t.Errorf("want mtu %d in %s", 1300+mtu, out)
		}
		b.detach(a)
	}
	b.gone()
}

// The namespace goes with its processes, and nobody says a word.
func TestVanishedNamespaceIsSwept(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			a := b.attachment(netOf(mode, 1), "www", 2)
			path := t.TempDir() + "/ns"
			ns, err := netns.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			a.Netns = ns
			a.Ports = []usernet.Port{tcp(8080, 80)}
			b.attach(a)
			if err := errors.Join(ns.Close(), netns.Remove(path)); err != nil {
				t.Fatal(err)
			}
			b.gone()
			if listening(8080) {
				t.Error("the port of the vanished container is still served")
			}
			if links, err := netlink.LinkList(); err != nil || len(links) != 1 {
				t.Errorf("links are left: %v, %v", links, err)
			}
		})
	}
}

// One container, two networks, the same ports wanted through both: the second network takes over when the first goes.
func TestPortsOfOneContainerOnTwoNetworks(t *testing.T) {
	b := newBench(t)
	a := b.attachment(netOf(usernet.Usermode, 1), "www", 2)
	a.Ports = []usernet.Port{tcp(8080, 80)}
	second := b.attachment(netOf(usernet.Usermode, 2), "www", 3)
	second.Netns, second.Ports, second.Endpoint.IfName = a.Netns, a.Ports, "eth1"
	serve(t, a.Netns, ":80")
	b.attach(a)
	b.attach(second)
	where := func() string {
		c, err := net.Dial("tcp", "127.0.0.1:8080")
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		text := make([]byte, 100)
		n, _ := c.Read(text)
		return string(text[:n])
	}
	if got := where(); got != "10.200.1.2:80" {
		t.Errorf("the port leads to %s", got)
	}
	b.detach(a)
	for deadline := time.Now().Add(10 * time.Second); where() != "10.200.2.3:80"; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the port leads to %s\n%s", where(), b.status())
		}
	}
	b.detach(second)
	b.gone()
}

// serve tells every client the address that it reached.
func serve(t *testing.T, ns *netns.NS, addr string) {
	t.Helper()
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, c.LocalAddr())
			c.Close()
		}
	}()
}

// A port that the engine holds is served all the same, from its clients' own addresses, and by a new process again.
func TestHeldPort(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			engine, err := net.Listen("tcp4", ":8080")
			if err != nil {
				t.Fatal(err)
			}
			defer engine.Close()
			a := b.attachment(netOf(mode, 1), "www", 2)
			held := tcp(8080, 80)
			held.HostIP, held.Held = netip.IPv4Unspecified(), true
			a.Ports = []usernet.Port{held}
			serve(t, a.Netns, ":80")
			b.attach(a)
			answers := func() {
				t.Helper()
				c, err := net.DialTimeout("tcp", "127.0.0.1:8080", 2*time.Second)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(2 * time.Second))
				text := make([]byte, 100)
				if n, err := c.Read(text); string(text[:n]) != "10.200.1.2:80" {
					t.Errorf("the port leads to %q, %v", text[:n], err)
				}
			}
			answers()
			b.restart()
			answers()
			b.detach(a)
			b.gone()
			if out, err := exec.Command("nft", "list", "ruleset").CombinedOutput(); err != nil || strings.Contains(string(out), "usernet-ports") {
				t.Errorf("redirections are left: %s, %v", out, err)
			}
		})
	}
}

// A client of a held UDP port keeps its own port, and so the kernel's memory of where it was redirected to: after a
// restart that is another port of ours.
func TestHeldUDPPortAcrossRestarts(t *testing.T) {
	b := newBench(t)
	engine, err := net.ListenPacket("udp4", ":5353")
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	a := b.attachment(netOf(usernet.Usermode, 1), "dns", 2)
	held := tcp(5353, 53)
	held.Proto, held.HostIP, held.Held = usernet.UDP, netip.IPv4Unspecified(), true
	a.Ports = []usernet.Port{held}
	var server net.PacketConn
	err = a.Netns.Do(func() (err error) {
		server, err = net.ListenPacket("udp4", ":53")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	echo := make(chan struct{})
	defer func() { server.Close(); <-echo }()
	go func() {
		defer close(echo)
		buf := make([]byte, 100)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			server.WriteTo(buf[:n], from)
		}
	}()
	b.attach(a)
	client, err := net.Dial("udp", "127.0.0.1:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for i := range 4 {
		client.SetDeadline(time.Now().Add(2 * time.Second))
		buf := make([]byte, 100)
		if _, err := client.Write([]byte{byte(i)}); err != nil {
			t.Errorf("question %d: %v", i, err)
		}
		if n, err := client.Read(buf); err != nil || n != 1 || buf[0] != byte(i) {
			t.Errorf("answer %d: %v, %v", i, buf[:n], err)
		}
		if i%2 == 0 {
			b.restart()
		} else {
			b.attach(a)
		}
	}
	b.detach(a)
	b.gone()
}

func TestFiveThousandPorts(t *testing.T) {
	for _, proto := range []usernet.Proto{usernet.TCP, usernet.UDP} {
		t.Run(string(proto), func(t *testing.T) {
			b := newBench(t)
			a := b.attachment(netOf(usernet.Usermode, 1), "www", 2)
			for i := range uint16(5000) {
				p := tcp(20000+i, 20000+i)
				p.Proto = proto
				four, six := p, p
				four.HostIP, four.Held = netip.IPv4Unspecified(), true
				six.HostIP = netip.IPv6Unspecified()
				a.Ports = append(a.Ports, four, six)
			}
			start := time.Now()
			b.attach(a)
			up := time.Now()
			b.detach(a)
			t.Logf("attached in %v, detached in %v", up.Sub(start).Round(time.Millisecond), time.Since(up).Round(time.Millisecond))
			b.gone()
		})
	}
}
