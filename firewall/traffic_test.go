package firewall

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// publish is a wildcard forward of a TCP and UDP port to the machine, in both families.
func publish(hostPort uint16, to machine, port uint16) (fs []Forward) {
	for _, proto := range []usernet.Proto{usernet.TCP, usernet.UDP} {
		for _, a := range []netip.Addr{to.v4, to.v6} {
			fs = append(fs, Forward{Proto: proto, HostPort: hostPort, Target: netip.AddrPortFrom(a, port)})
		}
	}
	return fs
}

// both is the state of the two networks, with a1's port 80 published as 8080 and a2's as 8081.
func (h *host) both() State {
	return State{
		Networks: []Network{
			{Bridge: "una", Subnets: subnetsA, Masquerade: true, Forwards: append(publish(8080, h.a1, 80), publish(8081, h.a2, 80)...)},
			{Bridge: "unb", Subnets: subnetsB, Masquerade: true},
		},
		Foreign: []string{"foreign0"},
	}
}

// serveAll starts a server on port 80 everywhere.
func (h *host) serveAll() {
	for name, m := range map[string]machine{"a1": h.a1, "a2": h.a2, "b1": h.b1, "f1": h.f1, "client": h.client} {
		m.serve(h.t, name, 80)
	}
}

// pick returns the machine's and the host's address of one family.
func (m machine) pick(v6 bool) netip.Addr {
	if v6 {
		return m.v6
	}
	return m.v4
}

func hostAddr(v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr(hostV6)
	}
	return netip.MustParseAddr(hostV4)
}

// eachFamily runs f for IPv4 and IPv6.
func eachFamily(t *testing.T, f func(t *testing.T, v6 bool)) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v6=%t", v6), func(t *testing.T) { f(t, v6) })
	}
}

func TestTraffic(t *testing.T) {
	h := newHost(t)
	h.serveAll()
	// What Docker leaves of the host: nothing passes unless somebody says so.
	for _, ipt := range []string{"iptables", "ip6tables"} {
		run(t, ipt+" -P FORWARD DROP")
		t.Cleanup(func() { run(t, ipt+" -P FORWARD ACCEPT") })
	}
	h.dropped(h.a1, h.client.v4, 80)
	fw := newFirewall(t)
	set(t, fw, h.both())
	eachFamily(t, h.checkTraffic)

	// Docker puts its rules on top whenever it starts; they accept what comes from its own bridge.
	for _, ipt := range []string{"iptables", "ip6tables"} {
		for _, rule := range []string{"-i foreign0 ! -o foreign0 -j ACCEPT", "-o foreign0 -j ACCEPT"} {
			run(t, ipt+" -I FORWARD "+rule)
			t.Cleanup(func() { run(t, ipt+" -D FORWARD "+rule) })
		}
	}
	t.Run("below Docker's rules", func(t *testing.T) {
		eachFamily(t, h.checkTraffic)
		if repaired, err := fw.Check(); repaired || err != nil {
			t.Errorf("Check = %t, %v: Docker's rules do no harm above ours", repaired, err)
		}
	})

	t.Run("unpublished", func(t *testing.T) {
		s := h.both()
		s.Networks[0].Forwards = nil
		set(t, fw, s)
		h := *h
		h.t = t
		if got, err := ask(h.client.ns, "tcp", hostAddr(false), 8080, patience); err == nil {
			t.Errorf("a port that is no longer published answers %q", got)
		}
	})
}

func (h *host) checkTraffic(t *testing.T, v6 bool) {
	at := *h
	h, at.t = &at, t
	me, client, a1, a2 := hostAddr(v6), h.client.pick(v6), h.a1.pick(v6), h.a2.pick(v6)
	gatewayA := a1.As16()
	gatewayA[15] = 1
	gateway := netip.AddrFrom16(gatewayA).Unmap()

	// Published: from outside with the client's address, from the host, from foreign containers and other networks.
	h.reaches(h.client, me, 8080, "a1 saw "+client.String())
	h.reaches(machine{}, me, 8080, "a1 saw "+me.String())
	h.reaches(machine{}, gateway, 8080, "a1 saw "+gateway.String())
	h.reaches(h.f1, me, 8080, "a1 saw "+h.f1.pick(v6).String())
	h.reaches(h.b1, me, 8080, "a1 saw "+gateway.String()) // masqueraded on its way out of unb
	// On the network; and out of it, behind the host's address.
	h.reaches(h.a1, a2, 80, "a2 saw "+a1.String())
	h.reaches(machine{}, a1, 80, "a1 saw "+gateway.String())
	h.reaches(h.a1, client, 80, "client saw "+me.String())
	// Nothing else.
	h.dropped(h.client, a1, 80)
	h.dropped(h.a1, h.b1.pick(v6), 80)
	h.dropped(h.b1, a1, 80)
	h.dropped(h.a1, h.f1.pick(v6), 80)
	h.dropped(h.f1, a1, 80)
}

func TestInternal(t *testing.T) {
	h := newHost(t)
	h.serveAll()
	s := h.both()
	s.Networks[0].Internal = true
	set(t, newFirewall(t), s)
	for _, ipt := range []string{"iptables", "ip6tables"} {
		run(t, ipt+" -P FORWARD DROP")
		t.Cleanup(func() { run(t, ipt+" -P FORWARD ACCEPT") })
	}
	eachFamily(t, func(t *testing.T, v6 bool) {
		h := *h
		h.t = t
		h.reaches(h.a1, h.a2.pick(v6), 80, "a2 saw "+h.a1.pick(v6).String())
		h.dropped(h.a1, h.client.pick(v6), 80)
		h.dropped(h.client, h.a1.pick(v6), 80)
		h.dropped(h.a1, h.b1.pick(v6), 80)
		h.dropped(h.f1, h.a1.pick(v6), 80)
		if got, err := ask(h.client.ns, "tcp", hostAddr(v6), 8080, patience); err == nil {
			t.Errorf("the port of an internal network answers %q", got)
		}
	})
}

func TestSourceAddress(t *testing.T) {
	h := newHost(t)
	h.serveAll()
	addTo(t, nil, "up0", "192.0.2.9/24")
	addTo(t, nil, "up0", "2001:db8::9/64")
	s := h.both()
	s.Networks[0].Source4, s.Networks[0].Source6 = netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")
	s.Networks[1].Masquerade = false
	set(t, newFirewall(t), s)
	h.reaches(h.a1, h.client.v4, 80, "client saw 192.0.2.9")
	h.reaches(h.a1, h.client.v6, 80, "client saw 2001:db8::9")
	h.reaches(h.b1, h.client.v4, 80, "client saw "+h.b1.v4.String())
	h.reaches(h.b1, h.client.v6, 80, "client saw "+h.b1.v6.String())
}

// A port on one host address is not open on the others, and one on loopback is left to the relay.
func TestHostAddresses(t *testing.T) {
	h := newHost(t)
	h.serveAll()
	addTo(t, nil, "up0", "192.0.2.9/24")
	s := h.both()
	at := func(ip string, port uint16) Forward {
		return Forward{usernet.TCP, netip.MustParseAddr(ip), port, netip.AddrPortFrom(h.a1.v4, 80)}
	}
	s.Networks[0].Forwards = []Forward{at("192.0.2.9", 8080), at("127.0.0.1", 8081), at("::", 8082)}
	set(t, newFirewall(t), s)
	if got, err := ask(h.client.ns, "tcp", netip.MustParseAddr("192.0.2.9"), 8080, time.Second); got != "a1 saw 192.0.2.2" {
		t.Errorf("the address with the port: %q, %v", got, err)
	}
	for _, to := range []string{"192.0.2.1:8080", "192.0.2.9:8081", "192.0.2.9:8082", "127.0.0.1:8081"} {
		ap := netip.MustParseAddrPort(to)
		from := h.client.ns
		if ap.Addr().IsLoopback() {
			from = nil
		}
		if got, err := ask(from, "tcp", ap.Addr(), ap.Port(), patience); err == nil {
			t.Errorf("%s answers %q", to, got)
		}
	}
}

func TestPortRange(t *testing.T) {
	h := newHost(t)
	s := h.both()
	s.Networks[0].Forwards = nil
	for i := range uint16(3) {
		h.a1.serve(t, fmt.Sprint("same ", 9000+i), 9000+int(i))
		h.a2.serve(t, fmt.Sprint("shifted ", 90+i), 90+int(i))
		s.Networks[0].Forwards = append(s.Networks[0].Forwards, publish(9000+i, h.a1, 9000+i)...)
		s.Networks[0].Forwards = append(s.Networks[0].Forwards, publish(9100+i, h.a2, 90+i)...)
	}
	set(t, newFirewall(t), s)
	eachFamily(t, func(t *testing.T, v6 bool) {
		h := *h
		h.t = t
		for i := range uint16(3) {
			h.reaches(h.client, hostAddr(v6), 9000+i, fmt.Sprintf("same %d saw %s", 9000+i, h.client.pick(v6)))
			h.reaches(h.client, hostAddr(v6), 9100+i, fmt.Sprintf("shifted %d saw %s", 90+i, h.client.pick(v6)))
		}
	})
}

// A UDP client that keeps its port went on talking to the container that had the published port before (moby#8795).
func TestFlushUDP(t *testing.T) {
	h := newHost(t)
	h.serveAll()
	fw := newFirewall(t)
	eachFamily(t, func(t *testing.T, v6 bool) {
		s := h.both()
		set(t, fw, s)
		var c, dns net.Conn
		err := h.client.ns.Do(func() (err error) {
			c, err = net.Dial("udp", netip.AddrPortFrom(hostAddr(v6), 8080).String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		// A conversation of a container with the same port number elsewhere.
		err = h.a1.ns.Do(func() (err error) {
			dns, err = net.Dial("udp", netip.AddrPortFrom(h.client.pick(v6), 8080).String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer dns.Close()
		dns.Write([]byte("?"))
		exchange(t, c, "a1 saw "+h.client.pick(v6).String())

		s.Networks[0].Forwards = publish(8080, h.a2, 80)
		set(t, fw, s)
		exchange(t, c, "a1 saw "+h.client.pick(v6).String()) // the test's premise
		for range 2 {
			if err := FlushUDP([]Forward{{Proto: usernet.UDP, HostPort: 8080}, {Proto: usernet.TCP, HostPort: 8081}}); err != nil {
				t.Fatal(err)
			}
		}
		exchange(t, c, "a2 saw "+h.client.pick(v6).String())
		if n := conversations(t, h.a1.pick(v6), h.client.pick(v6)); n != 1 {
			t.Errorf("%d conversations of a1 with the client's port 8080 are left, want the one", n)
		}
	})
}

func exchange(t *testing.T, c net.Conn, want string) {
	t.Helper()
	b := make([]byte, 128)
	c.SetDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte("?")); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(b)
	if got := string(b[:n]); got != want {
		t.Fatalf("answer %q, %v; want %q", got, err, want)
	}
}

func conversations(t *testing.T, src, dst netip.Addr) (n int) {
	t.Helper()
	family := netlink.InetFamily(unix.AF_INET)
	if src.Is6() {
		family = unix.AF_INET6
	}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if f.Forward.SrcIP.Equal(src.AsSlice()) && f.Forward.DstIP.Equal(dst.AsSlice()) && f.Forward.DstPort == 8080 {
			n++
		}
	}
	return n
}
