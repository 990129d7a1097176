package driver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/netns"
)

// named is an attachment of a container of its own, on a network where names are wanted.
func (b *bench) named(n usernet.Network, last byte, names ...string) Attachment {
	b.t.Helper()
	a := b.attachment(n, names[0], last)
	a.Container = Container{ID: strings.Repeat(names[0], 8), Name: names[0], Aliases: names[1:]}
	a.Names, a.Domains = true, []string{"dns.podman"}
	for _, s := range n.Subnets[1:] {
		ip := s.Prefix.Addr().As16()
		ip[15] = last
		a.Addresses = append(a.Addresses, netip.AddrFrom16(ip))
	}
	return a
}

func dualStack(mode usernet.Mode, n byte) usernet.Network {
	w := netOf(mode, n)
	w.IPv6 = true
	six := netip.MustParsePrefix(fmt.Sprintf("fd00:%x::/64", n))
	w.Subnets = append(w.Subnets, usernet.Subnet{Prefix: six, Gateway: six.Addr().Next()})
	return w
}

// ask looks a name or an address up from a namespace; an error is told by its beginning.
func ask(t *testing.T, ns *netns.NS, network string, server netip.Addr, name string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (c net.Conn, err error) {
		err = ns.Do(func() (err error) {
			c, err = new(net.Dialer).DialContext(ctx, network, netip.AddrPortFrom(server, 53).String())
			return err
		})
		return c, err
	}}
	var list []string
	var err error
	if _, perr := netip.ParseAddr(name); perr == nil {
		list, err = r.LookupAddr(ctx, name)
	} else {
		var ips []netip.Addr
		ips, err = r.LookupNetIP(ctx, "ip", name+".")
		for _, ip := range ips {
			list = append(list, ip.Unmap().String())
		}
	}
	if e, ok := err.(*net.DNSError); ok {
		return e.Err
	}
	if err != nil {
		return err.Error()
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

const nobody, misbehaving = "no such host", "server misbehaving"

// world is a DNS server where ns is that answers every question for an IPv4 address with 192.0.2.7.
func world(t *testing.T, ns *netns.NS, at string) netip.Addr {
	t.Helper()
	var pc net.PacketConn
	listen := func() (err error) {
		pc, err = net.ListenPacket("udp4", at+":53")
		return err
	}
	if err := ns.Do(listen); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { pc.Close(); <-done })
	go func() {
		defer close(done)
		buf := make([]byte, 512)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil {
				continue
			}
			m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
			if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60},
					Body:   &dnsmessage.AResource{A: [4]byte{192, 0, 2, 7}},
				}}
			}
			if out, err := m.Pack(); err == nil {
				pc.WriteTo(out, from)
			}
		}
	}()
	return netip.MustParseAddr(at)
}

func here(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// uplink gives the host an address beyond loopback.
func uplink(t *testing.T) {
	t.Helper()
	la := netlink.NewLinkAttrs()
	la.Name = "ext0"
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: la}); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("ext0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(link) })
	addr, err := netlink.ParseAddr("192.0.2.1/24")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		t.Fatal(err)
	}
}

func TestNames(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			uplink(t)
			up := world(t, here(t), "127.0.0.53")
			n := dualStack(mode, 1)
			www, client := b.named(n, 2, "www", "Front", "shop.example"), b.named(n, 3, "client")
			for _, a := range []*Attachment{&www, &client} {
				a.Upstream = []netip.Addr{n.Subnets[0].Gateway, up} // the first is ourselves, and not to be asked
			}
			b.attach(www)
			got := b.attach(client)
			if s := fmt.Sprint(got.DNS, got.Search); s != "[10.200.1.1 fd00:1::1] [dns.podman]" {
				t.Errorf("servers and domains: %s", s)
			}
			answers := func(table map[string]string) {
				t.Helper()
				for name, want := range table {
					for _, server := range got.DNS {
						for _, network := range []string{"udp", "tcp"} {
							if a := ask(t, client.Netns, network, server, name); a != want {
								t.Errorf("%s, asked of %s by %s: %s, want %s", name, server, network, a, want)
							}
						}
					}
				}
			}
			all := map[string]string{
				"www": "10.200.1.2 fd00:1::2", "www.dns.podman": "10.200.1.2 fd00:1::2", "front": "10.200.1.2 fd00:1::2", "shop.example": "10.200.1.2 fd00:1::2",
				"10.200.1.2": "www.dns.podman.", "fd00:1::2": "www.dns.podman.", "10.200.1.99": nobody,
				"nobody.dns.podman": nobody, "www.example.com": "192.0.2.7",
				"gateway.containers.internal": "10.200.1.1 fd00:1::1",
				"host.containers.internal":    "192.0.2.1", "host.docker.internal": "192.0.2.1",
			}
			answers(all)
			b.restart()
			answers(all)
			b.detach(www)
			answers(map[string]string{"www.dns.podman": nobody, "10.200.1.2": nobody, "client": "10.200.1.3 fd00:1::3"})
			www.Addresses = []netip.Addr{netip.MustParseAddr("10.200.1.9")}
			b.attach(www)
			answers(map[string]string{"www.dns.podman": "10.200.1.9", "10.200.1.9": "www.dns.podman.", "fd00:1::2": nobody})
			b.detach(www)
			b.detach(client)
			b.gone()
		})
	}
}

// Containers on another network learn nothing, wherever they ask, and those whose engine wants no names get no server.
func TestNamesStayOnTheirNetwork(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			n, other := netOf(mode, 1), netOf(mode, 2)
			n.Internal, other.Internal = true, true
			www, stranger := b.named(n, 2, "www"), b.named(other, 3, "stranger")
			b.attach(www)
			b.attach(stranger)
			table := map[netip.Addr]string{other.Subnets[0].Gateway: nobody}
			if mode == usernet.Bridge {
				// The gateway is an address of the host's, which strangers reach as well.
				inside(t, stranger.Netns, "ip route add 10.200.1.1 via 10.200.2.1")
				table[n.Subnets[0].Gateway] = misbehaving
				if got := ask(t, here(t), "udp", n.Subnets[0].Gateway, "www"); got != "10.200.1.2" {
					t.Errorf("the host is told %s", got)
				}
			}
			for server, want := range table {
				for _, name := range []string{"www", "www.dns.podman", "10.200.1.2", "www.example.com"} {
					if got := ask(t, stranger.Netns, "udp", server, name); got != want {
						t.Errorf("%s, asked of %s: %s, want %s", name, server, got, want)
					}
				}
			}
			plain := b.named(n, 4, "plain")
			plain.Names = false
			if got := b.attach(plain); len(got.DNS)+len(got.Search) > 0 {
				t.Errorf("servers for a container that wants none: %v %v", got.DNS, got.Search)
			}
			if got := ask(t, www.Netns, "udp", n.Subnets[0].Gateway, "plain"); got != "10.200.1.4" {
				t.Errorf("its neighbours find it at %s", got)
			}
			for _, a := range []Attachment{www, stranger, plain} {
				b.detach(a)
			}
			b.gone()
		})
	}
}

// One container on two networks asks the first and knows both; and it gets out, although the first is internal.
func TestNamesOfOneContainerOnTwoNetworks(t *testing.T) {
	for _, mode := range []usernet.Mode{usernet.Usermode, usernet.Bridge} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t)
			up := world(t, here(t), "127.0.0.53")
			first, second := netOf(mode, 1), netOf(mode, 2)
			first.Internal = true
			client, again := b.named(first, 2, "client"), b.named(second, 3, "client")
			again.Netns, again.Endpoint.IfName, again.Upstream = client.Netns, "eth1", []netip.Addr{up}
			neighbour, far := b.named(first, 4, "near"), b.named(second, 5, "far")
			far.Upstream = again.Upstream
			for _, a := range []Attachment{client, again, neighbour, far} {
				b.attach(a)
			}
			check := func(far, world string) {
				t.Helper()
				for name, want := range map[string]string{"near.dns.podman": "10.200.1.4", "far.dns.podman": far, "10.200.1.4": "near.dns.podman.", "www.example.com": world} {
					if got := ask(t, client.Netns, "udp", first.Subnets[0].Gateway, name); got != want {
						t.Errorf("%s: %s, want %s", name, got, want)
					}
				}
				if got := ask(t, neighbour.Netns, "udp", first.Subnets[0].Gateway, "far.dns.podman"); got != nobody {
					t.Errorf("a neighbour on one network is told %s", got)
				}
			}
			check("10.200.2.5", "192.0.2.7")
			b.restart()
			check("10.200.2.5", "192.0.2.7")
			b.detach(again)
			check(nobody, nobody)
			b.attach(again)
			check("10.200.2.5", "192.0.2.7")
			for _, a := range []Attachment{client, again, neighbour, far} {
				b.detach(a)
			}
			b.gone()
		})
	}
}

// A server of the user's own, in a container on the usermode network that it serves.
func TestUpstreamOnTheNetwork(t *testing.T) {
	b := newBench(t)
	n := netOf(usernet.Usermode, 1)
	server, client := b.named(n, 2, "server"), b.named(n, 3, "client")
	server.Upstream, client.Upstream = server.Addresses, server.Addresses
	b.attach(server)
	world(t, server.Netns, "10.200.1.2")
	b.attach(client)
	if got := ask(t, client.Netns, "udp", n.Subnets[0].Gateway, "www.example.com"); got != "192.0.2.7" {
		t.Errorf("told %s", got)
	}
	b.detach(server)
	b.detach(client)
	b.gone()
}

// Somebody has port 53 of all addresses. Containers are not sent there; when the port is free, they are.
func TestNamesWhenThePortIsTaken(t *testing.T) {
	b := newBench(t)
	dnsmasq, err := net.ListenPacket("udp4", "0.0.0.0:53")
	if err != nil {
		t.Fatal(err)
	}
	n := netOf(usernet.Bridge, 1)
	a := b.named(n, 2, "www")
	if got := b.attach(a); len(got.DNS)+len(got.Search) > 0 {
		t.Errorf("servers %v, domains %v", got.DNS, got.Search)
	}
	if s := b.Status()[0]; len(s.Resolver) > 0 || !strings.Contains(s.ResolverError, "10.200.1.1:53: bind: address already in use") {
		t.Errorf("status: listens at %v, %q", s.Resolver, s.ResolverError)
	}
	dnsmasq.Close()
	b.kickAll()
	for deadline := time.Now().Add(10 * time.Second); len(b.Status()[0].Resolver) == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still %q", b.Status()[0].ResolverError)
		}
	}
	if got := ask(t, a.Netns, "udp", n.Subnets[0].Gateway, "www"); got != "10.200.1.2" {
		t.Errorf("told %s", got)
	}
	if s := b.Status()[0]; s.ResolverError != "" {
		t.Errorf("status %q", s.ResolverError)
	}
	b.detach(a)
	b.gone()
}

// A host that takes in nothing but what it has a rule for.
func TestNamesOnAHostThatDrops(t *testing.T) {
	b := newBench(t)
	iptables := func(args string) string {
		t.Helper()
		out, err := exec.Command("iptables", strings.Fields(args)...).CombinedOutput()
		if err != nil {
			t.Fatalf("iptables %s: %v: %s", args, err, out)
		}
		return string(out)
	}
	iptables("-P INPUT DROP")
	t.Cleanup(func() { iptables("-P INPUT ACCEPT") })
	n := netOf(usernet.Bridge, 1)
	n.Internal = true
	a := b.named(n, 2, "www")
	b.attach(a)
	for _, network := range []string{"udp", "tcp"} {
		if got := ask(t, a.Netns, network, n.Subnets[0].Gateway, "www"); got != "10.200.1.2" {
			t.Errorf("told %s by %s", got, network)
		}
	}
	b.detach(a)
	b.gone()
	if out := iptables("-S"); strings.Contains(out, "USERNET") {
		t.Errorf("left: %s", out)
	}
}
