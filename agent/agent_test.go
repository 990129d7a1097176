package agent

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

func TestNewRefuses(t *testing.T) {
	good := Config{Command: []string{"true"}, Interface: "tap0"}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(c *Config){
		"no gateway":   func(c *Config) { c.Command = nil },
		"two gateways": func(c *Config) { c.Gateway, _ = vsock.Parse("vsock://2:1024") },
		"no name":      func(c *Config) { c.Interface = "" },
		"long name":    func(c *Config) { c.Interface = "a234567890123456" },
		"small mtu":    func(c *Config) { c.MTU = 67 },
		"large mtu":    func(c *Config) { c.MTU = 65522 },
		"group":        func(c *Config) { c.MAC = l2.MAC{1} },
	} {
		c := good
		spoil(&c)
		if _, err := New(c); !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("%s: %v, want %v", name, err, usernet.ErrInvalid)
		}
	}
}

// TestNetwork has the agent configure the machine as DHCP says, TCP pass whole both ways, and nothing left in the end.
func TestNetwork(t *testing.T) {
	for _, tt := range []struct {
		name string
		old  bool
		poor bool // the gateway's TAP finishes nothing
	}{{"usernet", false, false}, {"hyperkit", true, false}, {"without offload", false, true}} {
		t.Run(tt.name, func(t *testing.T) {
			noLeaks(t)
			h := newHost(t)
			h.old = tt.old
			if tt.poor {
				h.tap.takes = 0
			}
			h.serve()
			h.dhcp()
			cfg := h.config()
			cfg.ResolvConf = filepath.Join(t.TempDir(), "resolv.conf")
			if err := os.WriteFile(cfg.ResolvConf, []byte("nameserver 192.0.2.1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			r := run(t, cfg)
			r.await()

			want := machine{Addr: "192.168.127.2/24", Routes: []string{"0.0.0.0/0 via 192.168.127.1", "192.168.127.0/24"}, MTU: 1500, MAC: guestMAC.String(), AcceptRA: "2"}
			if d := cmp.Diff(want, look(t)); d != "" {
				t.Errorf("the machine (-want +got):\n%s", d)
			}
			text, err := os.ReadFile(cfg.ResolvConf)
			if got := strings.TrimPrefix(string(text), mark); err != nil || got != "nameserver 192.168.127.1\nsearch example.com\n" {
				t.Errorf("resolv.conf: %q, %v", text, err)
			}
			l := listenTCP(t, h.ns, gatewayIP.String()+":0")
			exchange(t, l, l.Addr().String(), 8<<20)

			r.stop()
			if _, err := netlink.LinkByName("tap0"); !gone(err) {
				t.Errorf("tap0 is left: %v", err)
			}
			if text, err := os.ReadFile(cfg.ResolvConf); err != nil || string(text) != "nameserver 192.0.2.1\n" {
				t.Errorf("resolv.conf in the end: %q, %v", text, err)
			}
		})
	}
}

// machine is how tap0 is configured.
type machine struct {
	Addr     string
	Routes   []string
	MTU      int
	MAC      string
	AcceptRA string
}

func look(t *testing.T) (m machine) {
	t.Helper()
	link, err := netlink.LinkByName("tap0")
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	if len(addrs) == 1 {
		m.Addr = addrs[0].IPNet.String()
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		s := r.Dst.String()
		if r.Gw != nil {
			s += " via " + r.Gw.String()
		}
		m.Routes = append(m.Routes, s)
	}
	slices.Sort(m.Routes)
	m.MTU, m.MAC = link.Attrs().MTU, link.Attrs().HardwareAddr.String()
	ra, err := os.ReadFile("/proc/thread-self/root/proc/sys/net/ipv6/conf/tap0/accept_ra")
	if err != nil {
		t.Fatal(err)
	}
	m.AcceptRA = strings.TrimSpace(string(ra))
	return m
}

// exchange sends random bytes to l by addr, has them sent back, and compares.
func exchange(t *testing.T, l net.Listener, addr string, n int64) {
	t.Helper()
	var g errgroup.Group
	g.Go(func() error {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(eventually))
		if _, err := io.Copy(c, c); err != nil {
			return err
		}
		return c.(*net.TCPConn).CloseWrite()
	})
	c, err := net.DialTimeout("tcp", addr, eventually)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(eventually))
	sent, got := sha256.New(), sha256.New()
	g.Go(func() error {
		seed := [32]byte{1}
		if _, err := io.Copy(io.MultiWriter(c, sent), io.LimitReader(rand.NewChaCha8(seed), n)); err != nil {
			return err
		}
		return c.(*net.TCPConn).CloseWrite()
	})
	back, err := io.Copy(got, c)
	if err = errors.Join(err, g.Wait()); err != nil || back != n || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Fatalf("%d of %d bytes came back, the same: %t, %v", back, n, bytes.Equal(sent.Sum(nil), got.Sum(nil)), err)
	}
}

// TestReconnect has the gateway vanish and come back, twice, with a connection of the machine's standing throughout.
func TestReconnect(t *testing.T) {
	noLeaks(t)
	h := newHost(t)
	h.dhcp()
	cfg := h.config()
	cfg.Wait, cfg.MaxWait = 10*time.Millisecond, 100*time.Millisecond
	r := run(t, cfg)
	await(t, false) // there is no gateway yet
	h.serve()
	r.await()
	await(t, true)
	<-h.up

	guest, peer := h.connection()
	for _, end := range []func(){
		h.cut,
		func() {
			h.stop()
			await(t, false)
			h.serve()
		},
	} {
		end()
		if _, err := io.WriteString(guest, "hello"); err != nil {
			t.Fatal(err)
		}
		<-h.up
		var buf [5]byte
		peer.SetDeadline(time.Now().Add(eventually))
		if _, err := io.ReadFull(peer, buf[:]); err != nil || string(buf[:]) != "hello" {
			t.Fatalf("got %q, %v", buf, err)
		}
	}
	if got := look(t); got.Addr != "192.168.127.2/24" {
		t.Errorf("the machine: %+v", got)
	}
}

// await waits until tap0 has a carrier, or none. (A change of less than a second need not be seen: the kernel tells it late.)
func await(t *testing.T, carrier bool) {
	t.Helper()
	updates, done := make(chan netlink.LinkUpdate, 100), make(chan struct{})
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		t.Fatal(err)
	}
	defer func() {
		close(done)
		for range updates { // until it is closed
		}
	}()
	for deadline := time.After(eventually); ; {
		link, err := netlink.LinkByName("tap0")
		if err == nil && link.Attrs().Flags&net.FlagUp != 0 && (link.Attrs().RawFlags&unix.IFF_LOWER_UP != 0) == carrier {
			return
		}
		select {
		case <-updates:
		case <-deadline:
			t.Fatalf("the carrier is not %t", carrier)
		}
	}
}

// TestRenewal has a server give leases of four seconds, whose time it sees extended.
func TestRenewal(t *testing.T) {
	noLeaks(t)
	h := newHost(t)
	h.lease = 4 * time.Second
	h.serve()
	s := h.dhcp()
	run(t, h.config()).await()
	expires := func() time.Time {
		for _, l := range s.Leases() {
			if l.Addr == guestIP {
				return l.Expires
			}
		}
		return time.Time{}
	}
	first := expires()
	for deadline := time.Now().Add(eventually); !expires().After(first); {
		if time.Now().After(deadline) {
			t.Fatal("the lease is not renewed")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if got := look(t); got.Addr != "192.168.127.2/24" {
		t.Errorf("the machine: %+v", got)
	}
}

// TestPreexisting has a TAP that others configure come out as it went in.
func TestPreexisting(t *testing.T) {
	noLeaks(t)
	if _, err := New(Config{Command: []string{"true"}, Interface: "tap0", Preexisting: true, Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	la := netlink.NewLinkAttrs()
	la.Name = "tap0"
	tuntap := &netlink.Tuntap{LinkAttrs: la, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(tuntap); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(tuntap)
	k, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := nettest.Addr(k, "tap0", netip.MustParsePrefix("192.168.127.7/24")); err != nil {
		t.Fatal(err)
	}
	before := look(t)
	h := newHost(t)
	h.serve()
	h.dhcp() // nobody asks
	cfg := h.config()
	cfg.Preexisting = true
	r := run(t, cfg)
	r.await()
	during := look(t)
	if during.MAC != guestMAC.String() || during.Addr != before.Addr {
		t.Errorf("the machine: %+v", during)
	}
	l := listenTCP(t, h.ns, gatewayIP.String()+":0")
	exchange(t, l, l.Addr().String(), 1<<20)
	r.stop()
	if d := cmp.Diff(before, look(t)); d != "" {
		t.Errorf("the machine in the end (-before +after):\n%s", d)
	}
}

// TestNoTAP has Run return why there can be none.
func TestNoTAP(t *testing.T) {
	noLeaks(t)
	for _, cfg := range []Config{
		{Command: []string{"true"}, Interface: "lo"},
		{Command: []string{"true"}, Interface: "none", Preexisting: true},
	} {
		cfg.Log = slog.New(slog.DiscardHandler)
		a, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), cfg.Interface) {
			t.Errorf("%s: %v", cfg.Interface, err)
		}
	}
}
