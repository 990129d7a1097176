package firewall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// The pretend host and its neighbours:
//
//	client 192.0.2.2 ── 192.0.2.1 host ┬ una      10.200.1.1 ┬ a1 10.200.1.2
//	       2001:db8::2    2001:db8::1  │          fd00:1::1  └ a2 10.200.1.3
//	                                   ├ unb      10.200.2.1 ─ b1 10.200.2.2
//	                                   └ foreign0 10.200.9.1 ─ f1 10.200.9.2
type host struct {
	t                      *testing.T
	client, a1, a2, b1, f1 machine
}

// machine is a namespace with an address of each family.
type machine struct {
	ns     *netns.NS
	v4, v6 netip.Addr
}

const (
	hostV4 = "192.0.2.1"
	hostV6 = "2001:db8::1"
)

var (
	subnetsA = prefixes("10.200.1.0/24", "fd00:1::/64")
	subnetsB = prefixes("10.200.2.0/24", "fd00:2::/64")
)

func prefixes(ss ...string) (ps []netip.Prefix) {
	for _, s := range ss {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func newHost(t *testing.T) *host {
	t.Helper()
	sysctl(t, "net/ipv6/conf/default/accept_dad", "0")
	for _, path := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		sysctl(t, path, "1")
	}
	h := &host{t: t}
	h.client = machine{nettest.NewNS(t), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::2")}
	nettest.Veth(t, "up0", netip.MustParsePrefix(hostV4+"/24"), h.client.ns, "eth0", netip.PrefixFrom(h.client.v4, 24))
	addTo(t, nil, "up0", hostV6+"/64")
	addTo(t, h.client.ns, "eth0", h.client.v6.String()+"/64")
	// The client could route to the containers, if it were let through.
	route(t, h.client.ns, "10.200.0.0/16", hostV4)
	route(t, h.client.ns, "fd00::/16", hostV6)
	h.bridge("una", "10.200.1.1/24", "fd00:1::1/64")
	h.bridge("unb", "10.200.2.1/24", "fd00:2::1/64")
	h.bridge("foreign0", "10.200.9.1/24", "fd00:9::1/64")
	h.a1 = h.container("una", "10.200.1.2", "fd00:1::2")
	h.a2 = h.container("una", "10.200.1.3", "fd00:1::3")
	h.b1 = h.container("unb", "10.200.2.2", "fd00:2::2")
	h.f1 = h.container("foreign0", "10.200.9.2", "fd00:9::2")
	return h
}

func (h *host) bridge(name string, addrs ...string) {
	h.t.Helper()
	la := netlink.NewLinkAttrs()
	la.Name = name
	br := &netlink.Bridge{LinkAttrs: la}
	if err := netlink.LinkAdd(br); err != nil {
		h.t.Fatalf("add bridge %s: %v", name, err)
	}
	h.t.Cleanup(func() { netlink.LinkDel(br) })
	for _, a := range addrs {
		addTo(h.t, nil, name, a)
	}
}

// container makes a machine on a bridge whose gateways are .1 and ::1.
func (h *host) container(bridge, v4, v6 string) machine {
	h.t.Helper()
	m := machine{nettest.NewNS(h.t), netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
	last := m.v4.As4()[3]
	end := fmt.Sprintf("%s.%d", bridge, last)
	nettest.Veth(h.t, end, netip.Prefix{}, m.ns, "eth0", netip.PrefixFrom(m.v4, 24))
	addTo(h.t, m.ns, "eth0", v6+"/64")
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		h.t.Fatal(err)
	}
	port, err := netlink.LinkByName(end)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := netlink.LinkSetMaster(port, br); err != nil {
		h.t.Fatal(err)
	}
	gw4, gw6 := m.v4.As4(), m.v6.As16()
	gw4[3], gw6[15] = 1, 1
	route(h.t, m.ns, "0.0.0.0/0", netip.AddrFrom4(gw4).String())
	route(h.t, m.ns, "::/0", netip.AddrFrom16(gw6).String())
	return m
}

// addTo adds an address to a link in ns; nil is the test's own namespace.
func addTo(t *testing.T, ns *netns.NS, link, addr string) {
	t.Helper()
	here(t, ns, func(h *netlink.Handle) error { return nettest.Addr(h, link, netip.MustParsePrefix(addr)) })
}

func route(t *testing.T, ns *netns.NS, dst, via string) {
	t.Helper()
	here(t, ns, func(h *netlink.Handle) error {
		_, n, err := net.ParseCIDR(dst)
		if err != nil {
			return err
		}
		return h.RouteAdd(&netlink.Route{Dst: n, Gw: net.ParseIP(via)})
	})
}

func here(t *testing.T, ns *netns.NS, f func(*netlink.Handle) error) {
	t.Helper()
	if ns == nil {
		var err error
		if ns, err = netns.Current(); err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
	}
	nettest.Handle(t, ns, f)
}

// sysctl sets a value of the test's namespace until the test ends.
func sysctl(t *testing.T, path, value string) {
	t.Helper()
	path = filepath.Join("/proc/sys", path)
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(path, old, 0) })
}

// serve answers every TCP connection and UDP packet to port in m with the name and the client's address.
func (m machine) serve(t *testing.T, name string, port int) {
	t.Helper()
	addr := fmt.Sprintf(":%d", port)
	var l net.Listener
	var pc net.PacketConn
	err := m.ns.Do(func() (err error) {
		if l, err = net.Listen("tcp", addr); err != nil {
			return err
		}
		pc, err = net.ListenPacket("udp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{}, 2)
	t.Cleanup(func() {
		l.Close()
		pc.Close()
		<-done
		<-done
	})
	answer := func(a net.Addr) string {
		ap := netip.MustParseAddrPort(a.String())
		return name + " saw " + ap.Addr().Unmap().WithZone("").String()
	}
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, answer(c.RemoteAddr()))
			c.Close()
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		b := make([]byte, 16)
		for {
			_, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo([]byte(answer(from)), from)
		}
	}()
}

// patience is how long a call that must not be answered waits; those that must be have answers in well under 1 ms.
const patience = 100 * time.Millisecond

// ask returns what a server answers when it is called from ns; nil is the host itself.
func ask(ns *netns.NS, network string, to netip.Addr, port uint16, wait time.Duration) (answer string, err error) {
	call := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		defer cancel()
		c, err := (&net.Dialer{}).DialContext(ctx, network, netip.AddrPortFrom(to, port).String())
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(wait))
		if network == "udp" {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
		}
		b := make([]byte, 128)
		n, err := c.Read(b)
		answer = string(b[:n])
		return err
	}
	if ns == nil {
		err = call()
	} else {
		err = ns.Do(call)
	}
	return answer, err
}

// reaches fails the test unless the call from ns is answered with want.
func (h *host) reaches(from machine, to netip.Addr, port uint16, want string) {
	h.t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		if got, err := ask(from.ns, network, to, port, time.Second); err != nil || got != want {
			h.t.Errorf("%s to %s port %d: %q, %v; want %q", network, to, port, got, err, want)
		}
	}
}

// dropped fails the test unless the call from ns remains without an answer.
func (h *host) dropped(from machine, to netip.Addr, port uint16) {
	h.t.Helper()
	got, err := ask(from.ns, "tcp", to, port, patience)
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		h.t.Errorf("tcp to %s port %d: %q, %v; want no answer", to, port, got, err)
	}
}

func newFirewall(t *testing.T) *Firewall {
	t.Helper()
	f, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func set(t *testing.T, f *Firewall, s State) {
	t.Helper()
	if err := f.Set(s); err != nil {
		t.Fatal(err)
	}
}

// run runs a command, a line of words without quoting, and returns its standard output.
func run(t *testing.T, line string) string {
	t.Helper()
	words := strings.Fields(line)
	cmd := exec.Command(words[0], words[1:]...)
	var stderr strings.Builder
	cmd.Stderr = &stderr // iptables of one variant warns there of tables of the other
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, stderr.String())
	}
	return string(out)
}

// list is iptables -S of every table that we use.
func list(t *testing.T, iptables string) string {
	t.Helper()
	var b strings.Builder
	for _, table := range []string{"mangle", "nat", "filter"} {
		fmt.Fprintf(&b, "*%s\n%s", table, run(t, iptables+" -t "+table+" -S"))
	}
	return b.String()
}
