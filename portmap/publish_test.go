package portmap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

func TestConflicts(t *testing.T) {
	for _, tt := range []struct {
		a, b     string // host addresses
		conflict bool
	}{
		{"", "", true},
		{"", "0.0.0.0", true},
		{"", "::", true},
		{"", "127.0.0.1", true},
		{"", "::1", true},
		{"0.0.0.0", "0.0.0.0", true},
		{"0.0.0.0", "127.0.0.1", true},
		{"0.0.0.0", "::", false},
		{"0.0.0.0", "::1", false},
		{"::", "::1", true},
		{"::", "127.0.0.1", false},
		{"127.0.0.1", "127.0.0.1", true},
		{"127.0.0.1", "127.0.0.2", false},
		{"127.0.0.1", "::ffff:127.0.0.1", true},
		{"127.0.0.1", "::1", false},
		{"::1", "::1", true},
	} {
		for _, proto := range []usernet.Proto{usernet.TCP, usernet.UDP, usernet.SCTP} {
			for _, order := range [][2]string{{tt.a, tt.b}, {tt.b, tt.a}} {
				t.Run(fmt.Sprintf("%s,%s,%s", proto, order[0], order[1]), func(t *testing.T) {
					testConflict(t, proto, order, tt.conflict)
				})
			}
		}
	}
}

func testConflict(t *testing.T, proto usernet.Proto, hosts [2]string, conflict bool) {
	m := newMapper(t)
	port := hostPort(t)
	request := func(owner, host string) Request {
		p := usernet.Port{Proto: proto, HostIP: addr(host), HostPort: port, ContainerPort: 80}
		return Request{Owner: owner, Port: p, Addr4: container, Dialer: Host{}}
	}
	first, err := m.Publish(request("endpoint one", hosts[0]))
	if err != nil {
		t.Fatal(err)
	}
	second, err := m.Publish(request("endpoint two", hosts[1]))
	if (err != nil) != conflict {
		t.Fatalf("the second got %v, want a conflict: %v", err, conflict)
	}
	if conflict {
		want := fmt.Sprintf(":%d/%s: port is already allocated by endpoint one", port, proto)
		if !errors.Is(err, usernet.ErrPortTaken) || !strings.HasPrefix(err.Error(), "bind ") || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("error %q (port taken: %v), want bind HOST%s", err, errors.Is(err, usernet.ErrPortTaken), want)
		}
		if ip := addr(hosts[1]).Unmap(); ip.IsValid() && !strings.Contains(err.Error(), netip.AddrPortFrom(ip, port).String()) {
			t.Errorf("error %q does not name %s", err, ip)
		}
		closeSoon(t, first)
		if second, err = m.Publish(request("endpoint two", hosts[1])); err != nil {
			t.Fatalf("after the first has gone: %v", err)
		}
	}
	closeSoon(t, second)
	closeSoon(t, first)
	closeSoon(t, first)
}

func TestSameNumberOfEveryProtocol(t *testing.T) {
	m := newMapper(t)
	port := hostPort(t)
	for _, proto := range []usernet.Proto{usernet.TCP, usernet.UDP, usernet.SCTP} {
		mustPublish(t, m, usernet.Port{Proto: proto, HostPort: port, ContainerPort: 80}, Host{})
	}
}

func TestOneOfManyGetsThePort(t *testing.T) {
	m := newMapper(t)
	p := usernet.Port{Proto: usernet.TCP, HostPort: hostPort(t), ContainerPort: 80}
	var wg sync.WaitGroup
	won := make(chan *Forward, 50)
	for range cap(won) {
		wg.Go(func() {
			f, err := m.Publish(Request{Owner: "endpoint one", Port: p, Addr4: container, Dialer: Host{}})
			if err == nil {
				won <- f
			} else if !strings.HasSuffix(err.Error(), "by endpoint one") {
				t.Errorf("error %q does not name the holder", err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d of %d got the port", len(won), cap(won))
	}
	for range len(won) {
		closeSoon(t, <-won)
	}
}

func TestRange(t *testing.T) {
	for _, proto := range []usernet.Proto{usernet.TCP, usernet.UDP, usernet.SCTP} {
		t.Run(string(proto), func(t *testing.T) {
			m := newMapper(t)
			p := usernet.Port{Proto: proto, HostPort: 20000, HostPortEnd: 20002, ContainerPort: 80}
			for want := uint16(20000); want <= 20002; want++ {
				f := mustPublish(t, m, p, Host{})
				if got := f.Port(); got.HostPort != want || got.HostPortEnd != want || got.ContainerPort != 80 {
					t.Errorf("published %+v, want host port %d", got, want)
				}
			}
			_, err := m.Publish(Request{Port: p, Addr4: container, Dialer: Host{}})
			want := fmt.Sprintf("no free port in 20000-20002: bind 0.0.0.0:20000/%s: port is already allocated by endpoint test", proto)
			if !errors.Is(err, usernet.ErrPortTaken) || err.Error() != want {
				t.Errorf("error of a range that is used up:\n got %v\nwant %s", err, want)
			}
		})
	}
}

func TestRangeUpToTheLastPort(t *testing.T) {
	m := newMapper(t)
	p := usernet.Port{Proto: usernet.TCP, HostPort: 65535, HostPortEnd: 65535, ContainerPort: 80}
	if f := mustPublish(t, m, p, Host{}); f.Port().HostPort != 65535 {
		t.Errorf("published %v", f.Port())
	}
}

func TestEphemeral(t *testing.T) {
	for _, proto := range []usernet.Proto{usernet.TCP, usernet.UDP, usernet.SCTP} {
		t.Run(string(proto), func(t *testing.T) {
			m := newMapper(t)
			seen := map[uint16]bool{}
			for range 50 {
				got := mustPublish(t, m, usernet.Port{Proto: proto, ContainerPort: 80}, Host{}).Port()
				if got.HostPort < 1024 || got.HostPortEnd != got.HostPort || seen[got.HostPort] {
					t.Fatalf("published %+v", got)
				}
				seen[got.HostPort] = true
				if proto == usernet.SCTP {
					continue
				}
				// Both families have it: a stranger gets neither.
				for _, host := range []string{"127.0.0.1", "::1"} {
					at := netip.AddrPortFrom(addr(host), got.HostPort).String()
					if err := bindAsStranger(proto, at); !errors.Is(err, unix.EADDRINUSE) {
						t.Errorf("bind %s: %v, want address in use", at, err)
					}
				}
			}
		})
	}
}

func bindAsStranger(proto usernet.Proto, at string) error {
	if proto == usernet.UDP {
		c, err := net.ListenPacket("udp", at)
		if err == nil {
			c.Close()
		}
		return err
	}
	ln, err := net.Listen("tcp", at)
	if err == nil {
		ln.Close()
	}
	return err
}

// portRange narrows the ephemeral range for a test.
func portRange(t *testing.T, low, high int) {
	t.Helper()
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, fmt.Appendf(nil, "%d %d", low, high), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, old, 0); err != nil {
			t.Error(err)
		}
	})
}

func TestEphemeralFindsThePortThatIsFreeInBothFamilies(t *testing.T) {
	for _, proto := range []usernet.Proto{usernet.TCP, usernet.UDP} {
		t.Run(string(proto), func(t *testing.T) {
			m := newMapper(t)
			portRange(t, 40000, 40003)
			for _, taken := range []int{40000, 40001, 40003} {
				at := fmt.Sprintf("[::1]:%d", taken)
				if proto == usernet.TCP {
					ln, err := net.Listen("tcp", at)
					if err != nil {
						t.Fatal(err)
					}
					defer ln.Close()
				} else {
					c, err := net.ListenPacket("udp", at)
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
				}
			}
			p := usernet.Port{Proto: proto, ContainerPort: 80}
			if f := mustPublish(t, m, p, Host{}); f.Port().HostPort != 40002 {
				t.Errorf("published %v, want 40002, the only one left", f.Port())
			}
			_, err := m.Publish(Request{Port: p, Addr4: container, Dialer: Host{}})
			if !errors.Is(err, usernet.ErrPortTaken) || !strings.HasPrefix(err.Error(), "choose a free "+string(proto)+" port: bind ") {
				t.Errorf("with none left: %v", err)
			}
		})
	}
}

func TestEphemeralSCTPUsesUpTheRange(t *testing.T) {
	m := newMapper(t)
	portRange(t, 40000, 40003)
	p := usernet.Port{Proto: usernet.SCTP, ContainerPort: 80}
	seen := map[uint16]bool{}
	for range 4 {
		seen[mustPublish(t, m, p, nil).Port().HostPort] = true
	}
	for port := uint16(40000); port <= 40003; port++ {
		if !seen[port] {
			t.Errorf("never chose %d of 40000-40003", port)
		}
	}
	if _, err := m.Publish(Request{Port: p, Addr4: container}); !errors.Is(err, usernet.ErrPortTaken) {
		t.Errorf("with none left: %v", err)
	}
}

// give hands a socket to a process that does nothing with it, and returns the process as an error names it.
func give(t *testing.T, s interface {
	File() (*os.File, error)
	Close() error
}) string {
	t.Helper()
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("sleep", "60")
	cmd.ExtraFiles = []*os.File{f}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	s.Close()
	return fmt.Sprintf("sleep (pid %d)", cmd.Process.Pid)
}

func TestForeignHolderIsNamed(t *testing.T) {
	for _, tt := range []struct {
		proto   usernet.Proto
		network string
		listen  string
		host    string
		bind    string // what the error says was to be bound, without port
	}{
		{usernet.TCP, "tcp4", "127.0.0.1", "", "0.0.0.0"},
		{usernet.TCP, "tcp6", "::1", "", "[::]"},
		{usernet.TCP, "tcp", "::", "127.0.0.1", "127.0.0.1"},
		{usernet.TCP, "tcp4", "0.0.0.0", "127.0.0.1", "127.0.0.1"},
		{usernet.UDP, "udp4", "127.0.0.1", "", "0.0.0.0"},
		{usernet.UDP, "udp6", "::1", "::1", "[::1]"},
		{usernet.UDP, "udp", "::", "", "0.0.0.0"},
	} {
		t.Run(tt.network+","+tt.listen+","+tt.host, func(t *testing.T) {
			m := newMapper(t)
			port := hostPort(t)
			at := netip.AddrPortFrom(addr(tt.listen), port)
			var holder string
			if tt.proto == usernet.TCP {
				ln, err := net.ListenTCP(tt.network, net.TCPAddrFromAddrPort(at))
				if err != nil {
					t.Fatal(err)
				}
				holder = give(t, ln)
			} else {
				c, err := net.ListenUDP(tt.network, net.UDPAddrFromAddrPort(at))
				if err != nil {
					t.Fatal(err)
				}
				holder = give(t, c)
			}
			p := usernet.Port{Proto: tt.proto, HostIP: addr(tt.host), HostPort: port, ContainerPort: 80}
			_, err := m.Publish(Request{Port: p, Addr4: container, Dialer: Host{}})
			want := fmt.Sprintf("bind %s:%d/%s: port is already allocated by %s", tt.bind, port, tt.proto, holder)
			if !errors.Is(err, usernet.ErrPortTaken) || err.Error() != want {
				t.Errorf("error\n got %v\nwant %s", err, want)
			}
		})
	}
}

func TestInvalidRequests(t *testing.T) {
	m := newMapper(t)
	good := Request{
		Port:   usernet.Port{Proto: usernet.TCP, HostIP: addr("127.0.0.1"), HostPort: 8080, ContainerPort: 80},
		Addr4:  container,
		Dialer: Host{},
	}
	for name, change := range map[string]func(r *Request){
		"unknown protocol":      func(r *Request) { r.Port.Proto = "icmp" },
		"no protocol":           func(r *Request) { r.Port.Proto = "" },
		"container port 0":      func(r *Request) { r.Port.ContainerPort = 0 },
		"range backwards":       func(r *Request) { r.Port.HostPortEnd = 8079 },
		"range from 0":          func(r *Request) { r.Port.HostPort, r.Port.HostPortEnd = 0, 10 },
		"multicast":             func(r *Request) { r.Port.HostIP = addr("224.0.0.1") },
		"no container address":  func(r *Request) { r.Addr4 = netip.Addr{} },
		"IPv6 address as Addr4": func(r *Request) { r.Addr4 = addr("2001:db8::1") },
		"IPv4 address as Addr6": func(r *Request) { r.Addr6 = container },
		"no dialer":             func(r *Request) { r.Dialer = nil },
	} {
		r := good
		change(&r)
		f, err := m.Publish(r)
		if !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
		if err == nil {
			f.Close()
		}
	}
}

func TestForeignAddress(t *testing.T) {
	m := newMapper(t)
	for _, tt := range []struct{ host, want string }{
		{"192.0.2.1", "bind 192.0.2.1:8080/tcp: not an address of this host: cannot assign requested address"},
		{"2001:db8::1", "bind [2001:db8::1]:8080/tcp: not an address of this host: cannot assign requested address"},
	} {
		// A range must not be walked through: every port of it has the same fault.
		p := usernet.Port{Proto: usernet.TCP, HostIP: addr(tt.host), HostPort: 8080, HostPortEnd: 9000, ContainerPort: 80}
		_, err := m.Publish(Request{Port: p, Addr4: container, Dialer: Host{}})
		if err == nil || err.Error() != tt.want || errors.Is(err, usernet.ErrPortTaken) {
			t.Errorf("error\n got %v\nwant %s", err, tt.want)
		}
	}
}

func TestPrivilegedPort(t *testing.T) {
	m := newMapper(t)
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with what it gave up
		if err := dropCapability(unix.CAP_NET_BIND_SERVICE); err != nil {
			result <- err
			return
		}
		p := usernet.Port{Proto: usernet.UDP, HostPort: 80, ContainerPort: 80}
		_, err := m.Publish(Request{Port: p, Addr4: container, Dialer: Host{}})
		result <- err
	}()
	const want = "bind 0.0.0.0:80/udp: permission denied: a privileged port needs CAP_NET_BIND_SERVICE, or sysctl net.ipv4.ip_unprivileged_port_start=80"
	if err := <-result; err == nil || err.Error() != want || !errors.Is(err, unix.EACCES) {
		t.Errorf("error\n got %v\nwant %s", err, want)
	}
}

// dropCapability takes a capability from the calling thread.
func dropCapability(c int) error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&h, &data[0]); err != nil {
		return err
	}
	data[c/32].Effective &^= 1 << (c % 32)
	return unix.Capset(&h, &data[0])
}

func TestHostWithoutIPv6Addresses(t *testing.T) {
	m := newMapper(t)
	const file = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, []byte("0"), 0); err != nil {
			t.Error(err)
		}
	})
	mustPublish(t, m, usernet.Port{Proto: usernet.TCP, ContainerPort: 80}, Host{})
	mustPublish(t, m, usernet.Port{Proto: usernet.UDP, ContainerPort: 80}, Host{})
}

func TestNoSuchFamily(t *testing.T) {
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), 80)
	for errno, want := range map[syscall.Errno]bool{
		unix.EAFNOSUPPORT:  true, // ipv6.disable=1
		unix.EADDRNOTAVAIL: true,
		unix.EADDRINUSE:    false,
		unix.EACCES:        false,
	} {
		err := bindError(usernet.TCP, at, &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", errno)})
		if got := noSuchFamily(err); got != want {
			t.Errorf("noSuchFamily(%v) = %v, want %v", err, got, want)
		}
	}
}
