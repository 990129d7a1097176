package vmnet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet/usermode/l2"
)

// eachFraming runs a test with machines that take large frames, and with those that do not.
func eachFraming(t *testing.T, f func(t *testing.T, framing l2.Framing)) {
	for _, framing := range []l2.Framing{l2.Usernet, l2.HyperKit} {
		t.Run(framing.String(), func(t *testing.T) { f(t, framing) })
	}
}

var loopback = netip.MustParseAddr("127.0.0.1")

// TestTCPOut: every byte of both directions arrives, by IPv4, IPv6 and NAT.
func TestTCPOut(t *testing.T) {
	eachFraming(t, func(t *testing.T, framing l2.Framing) {
		b := newBed(t, testConfig(t))
		m := b.machine(2, framing)
		m.addr6()
		for dial, at := range map[netip.Addr]netip.Addr{
			host4.Addr(): host4.Addr(), host6.Addr(): host6.Addr(), alias: loopback,
		} {
			to := (*machine)(nil).listen(t, netip.AddrPortFrom(at, 0), echo)
			c := m.mustDial("tcp", netip.AddrPortFrom(dial, to.Port()))
			echoed(t, c, 16<<20)
		}
		if s := b.Stats(); s.Spoofed != 0 {
			t.Errorf("%d spoofed", s.Spoofed)
		}
	})
}

// echoed sends size bytes over c and checks that they come back.
func echoed(t testing.TB, c net.Conn, size int64) {
	t.Helper()
	noise := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(struct{ io.Writer }{c}, noise())
		sent <- errors.Join(err, c.(interface{ CloseWrite() error }).CloseWrite())
	}()
	sum := func(r io.Reader) string {
		h := sha256.New()
		if n, err := io.Copy(h, r); err != nil {
			t.Errorf("after %d bytes: %v", n, err)
		}
		return string(h.Sum(nil))
	}
	got := sum(c)
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if got != sum(noise()) {
		t.Errorf("not the %d bytes that went came back", size)
	}
}

// TestRefused: what cannot or must not be reached is refused at once, and nothing of it is dialled.
func TestRefused(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	m.addr6()
	m.sysctl("net/ipv4/conf/all/route_localnet", "1")
	arrived := make(chan string, 100)
	to := (*machine)(nil).listen(t, netip.MustParseAddrPort("[::]:0"), func(c net.Conn) { arrived <- c.LocalAddr().String() })
	for name, dst := range map[string]netip.Addr{
		"gateway":              gateway,
		"gateway, IPv6":        gateway6,
		"virtual address":      virtualIP,
		"metadata service":     netip.MustParseAddr("169.254.169.254"),
		"nobody listens":       host4.Addr(),
		"another machine, IP6": netip.MustParseAddr("::ffff:127.0.0.1"),
	} {
		port := to.Port()
		if name == "nobody listens" {
			port = 1
		}
		start := time.Now()
		c, err := m.dial("tcp", netip.AddrPortFrom(dst, port))
		if err == nil {
			c.Close()
			t.Errorf("%s: connected", name)
		} else if name != "another machine, IP6" && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, want ECONNREFUSED", name, err)
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("%s: took %v", name, d)
		}
	}
	if len(arrived) > 0 {
		t.Errorf("something arrived at %s", <-arrived)
	}
}

// TestPing: the gateway answers for itself, flows carries the rest; also what must be cut.
func TestPing(t *testing.T) {
	eachFraming(t, func(t *testing.T, framing l2.Framing) {
		b := newBed(t, testConfig(t))
		m := b.machine(2, framing)
		m.addr6()
		for _, to := range []netip.Addr{gateway, virtualIP, gateway6, host4.Addr(), host6.Addr(), alias} {
			for _, size := range []string{"56", "4000"} {
				if _, err := m.run("busybox", "ping", "-c", "1", "-W", "5", "-s", size, to.String()); err != nil {
					t.Errorf("%s bytes: %v", size, err)
				}
			}
		}
		if _, err := m.run("busybox", "ping", "-c", "1", "-W", "1", "192.168.127.77"); err == nil {
			t.Error("somebody answers for an address that nobody has")
		}
	})
}

// TestUDP: datagrams of all lengths to the world and to the network's own sockets.
func TestUDP(t *testing.T) {
	eachFraming(t, func(t *testing.T, framing l2.Framing) {
		b := newBed(t, testConfig(t))
		m := b.machine(2, framing)
		m.addr6()
		inside, err := b.ListenUDP(53)
		if err != nil {
			t.Fatal(err)
		}
		defer inside.Close()
		if _, err := b.ListenUDP(53); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("a second listener: %v", err)
		}
		var wg sync.WaitGroup
		serve := func(c net.PacketConn) {
			for buf := make([]byte, 65536); ; {
				n, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				c.WriteTo(buf[:n], from)
			}
		}
		wg.Go(func() { serve(inside) })
		for _, dial := range []netip.Addr{gateway, gateway6, virtualIP, host4.Addr(), host6.Addr()} {
			to := netip.AddrPortFrom(dial, 53)
			if !b.addresses.own[dial] {
				c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(dial, 0)))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				wg.Go(func() { serve(c) })
				to = c.LocalAddr().(*net.UDPAddr).AddrPort()
			}
			c := m.mustDial("udp", to)
			for _, size := range []int{1, 512, 1472, 8000} {
				want := bytes.Repeat([]byte{byte(size)}, size)
				c.Write(want)
				got := make([]byte, 65536)
				c.SetReadDeadline(time.Now().Add(10 * time.Second))
				if n, err := c.Read(got); err != nil || !bytes.Equal(got[:n], want) {
					t.Errorf("%s: %d of %d bytes, %v", to, n, size, err)
				}
			}
			burst(t, c)
			c.Close()
		}
		refused := m.mustDial("udp", netip.AddrPortFrom(gateway, 99))
		refused.Write([]byte("x"))
		if _, err := refused.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a port of the gateway's at which nobody listens: %v", err)
		}
		inside.Close()
		t.Cleanup(wg.Wait)
	})
}

// burst sends datagrams of different lengths to an echo without waiting, and wants them back in their order.
func burst(t *testing.T, c net.Conn) {
	t.Helper()
	const count = 60
	data := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, 1+i/20*400+i%20/19) }
	for i := range count {
		if _, err := c.Write(data(i)); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 2000)
	for i := range count {
		if n, err := c.Read(buf); err != nil || !bytes.Equal(buf[:n], data(i)) {
			t.Fatalf("%s: datagram %d of a burst: %d bytes, %v, want %d", c.RemoteAddr(), i, n, err, len(data(i)))
		}
	}
}

// TestListenTCP: a service is at the gateway's addresses, and nowhere else.
func TestListenTCP(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	m.addr6()
	l, err := b.ListenTCP(80)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.ListenTCP(80); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("accept: %v", err)
				}
				return
			}
			fmt.Fprint(c, c.RemoteAddr())
			c.Close()
		}
	}()
	for _, addr := range []netip.Addr{gateway, gateway6, virtualIP} {
		c := m.mustDial("tcp", netip.AddrPortFrom(addr, 80))
		if got, err := io.ReadAll(c); string(got) != c.LocalAddr().String() || err != nil {
			t.Errorf("%s says %q, %v", addr, got, err)
		}
	}
	for _, addr := range []netip.Addr{host4.Addr(), alias, host6.Addr()} {
		if c, err := m.dial("tcp", netip.AddrPortFrom(addr, 80)); err == nil {
			t.Errorf("the service is at %s too", addr)
			c.Close()
		}
	}
	l.Close()
	<-done
}

// TestMachineToMachine: the switch carries it, unless they are isolated.
func TestMachineToMachine(t *testing.T) {
	for _, isolated := range []bool{false, true} {
		t.Run(fmt.Sprintf("isolated=%t", isolated), func(t *testing.T) {
			cfg := testConfig(t)
			cfg.Isolated = isolated
			b := newBed(t, cfg)
			one, two := b.machine(2, l2.Usernet), b.machine(3, l2.HyperKit)
			to := two.listen(t, netip.AddrPortFrom(two.addr, 0), echo)
			if !isolated {
				echoed(t, one.mustDial("tcp", to), 4<<20)
				echoed(t, two.mustDial("tcp", one.listen(t, netip.AddrPortFrom(one.addr, 0), echo)), 4<<20)
				return
			}
			err := one.ns.Do(func() error {
				c, err := net.DialTimeout("tcp", to.String(), 2*time.Second)
				if err == nil {
					c.Close()
				}
				return err
			})
			if err == nil {
				t.Error("isolated machines reach each other")
			}
		})
	}
}

// TestDHCP has busybox's client get an address, twice the same, and then use it.
func TestDHCP(t *testing.T) {
	if _, err := exec.LookPath("busybox"); err != nil && os.Getenv("USERNET_TEST_STRICT") == "" {
		t.Skip(err)
	}
	eachFraming(t, func(t *testing.T, framing l2.Framing) {
		b := newBed(t, testConfig(t))
		m := b.machineWithoutAddr(framing)
		m.up()
		dir := t.TempDir()
		script, said := filepath.Join(dir, "script"), filepath.Join(dir, "said")
		text := "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nbusybox ip addr add $ip/$mask dev $interface\nbusybox ip route add default via $router\n" +
			"echo \"$ip/$mask $router $dns $mtu $search\" >" + said + "\n"
		if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := m.run("busybox", "udhcpc", "-i", tapName, "-f", "-q", "-n", "-t", "5", "-T", "2", "-s", script, "-O", "search", "-O", "mtu", "-x", "hostname:web"); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(said)
			if err != nil {
				t.Fatal(err)
			}
			if want := "192.168.127.2/24 192.168.127.1 192.168.127.1 1500 example.com"; strings.TrimSpace(string(got)) != want {
				t.Errorf("the machine is told %q, want %q", got, want)
			}
			m.run("busybox", "ip", "route", "del", "default")
			m.run("busybox", "ip", "addr", "flush", "dev", tapName, "scope", "global")
		}
		leases := b.Leases()
		if len(leases) != 1 || leases[0].Name != "web" || leases[0].Port == 0 {
			t.Errorf("leases %+v", leases)
		}
	})
}

// TestReconnect: a machine whose helper or hypervisor starts anew goes on where it was, on another port and with other framing.
func TestReconnect(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.HyperKit)
	to := (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), echo)
	exchange(t, m.mustDial("tcp", to), "before")
	m.out()
	m.plug(b, l2.Usernet)
	m.setAddr()
	exchange(t, m.mustDial("tcp", to), "after")
	service := m.listen(t, netip.AddrPortFrom(m.addr, 0), echo)
	c, err := b.DialTCP(t.Context(), netip.AddrPort{}, service)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	exchange(t, c, "inwards")
}

// TestBlackHoles: dials that nobody answers keep nobody from anything.
func TestBlackHoles(t *testing.T) {
	cfg := testConfig(t)
	cfg.TCP.Dial = 3 * time.Second
	b := newBed(t, cfg)
	m, other := b.machine(2, l2.Usernet), b.machine(3, l2.Usernet)
	to := (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), echo)
	hole := netip.AddrPortFrom(host4.Addr().Next(), 80) // nobody answers ARP there
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			m.ns.Do(func() error {
				c, err := (&net.Dialer{}).DialContext(ctx, "tcp", hole.String())
				if err == nil {
					c.Close()
				}
				return err
			})
		})
	}
	eventually(t, "ten dials hang", func() bool { return b.Stats().Pending == 10 })
	exchange(t, m.mustDial("tcp", to), "the same machine")
	exchange(t, other.mustDial("tcp", to), "another machine")
	cancel()
	wg.Wait()
	eventually(t, "they are given up", func() bool { return b.Stats().Pending == 0 })
}

// TestSpoofing: a machine that sends from another one's address is not heard.
func TestSpoofing(t *testing.T) {
	b := newBed(t, testConfig(t))
	victim, thief := b.machine(2, l2.Usernet), b.machine(3, l2.Usernet)
	to := (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), echo)
	c := victim.mustDial("tcp", to)
	exchange(t, c, "mine")
	if _, err := thief.run("busybox", "ip", "addr", "add", victim.addr.String()+"/32", "dev", tapName); err != nil {
		t.Fatal(err)
	}
	thief.run("busybox", "arping", "-U", "-c", "3", "-w", "3", "-I", tapName, "-s", victim.addr.String(), gateway.String())
	if b.Stats().Spoofed == 0 {
		t.Error("a thief's claim was heard")
	}
	exchange(t, c, "still mine")
	exchange(t, victim.mustDial("tcp", to), "new")
	exchange(t, thief.mustDial("tcp", to), "its own address still works")
}
