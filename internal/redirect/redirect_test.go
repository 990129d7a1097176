package redirect_test

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

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/internal/redirect"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var (
	any4 = netip.IPv4Unspecified()
	any6 = netip.IPv6Unspecified()
	lo4  = netip.MustParseAddr("127.0.0.1")
)

// listenTCP listens on all addresses and returns the port, and the addresses that connections were made from and to.
func listenTCP(t *testing.T) (uint16, <-chan net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	conns := make(chan net.Conn, 16)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	return uint16(l.Addr().(*net.TCPAddr).Port), conns
}

// hold binds a port as the one who published it does.
func hold(t *testing.T, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// reaches tells whether a connection to addr ends at our listener, from the client's own address.
func reaches(t *testing.T, addr string, conns <-chan net.Conn) bool {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 300*time.Millisecond)
	if err != nil {
		return false
	}
	defer c.Close()
	select {
	case got := <-conns:
		defer got.Close()
		if got.RemoteAddr().String() != c.LocalAddr().String() {
			t.Errorf("%s: the client shows as %s, it is %s", addr, got.RemoteAddr(), c.LocalAddr())
		}
		if to, _, _ := net.SplitHostPort(got.LocalAddr().String()); !strings.Contains(addr, to) {
			t.Errorf("dialled %s, arrived at %s", addr, to)
		}
		return true
	case <-time.After(300 * time.Millisecond):
		return false
	}
}

func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestTCP(t *testing.T) {
	ns := nettest.NewNS(t)
	nettest.Veth(t, "wire", netip.MustParsePrefix("10.200.0.2/24"), ns, "eth0", netip.MustParsePrefix("10.200.0.1/24"))
	hold(t, "0.0.0.0:8080")
	hold(t, "[::1]:8081")
	hold(t, "10.200.0.2:8082")
	to, conns := listenTCP(t)
	var table redirect.Table
	defer table.Set("a", nil)
	err := table.Set("a", []redirect.Port{
		{Proto: usernet.TCP, Addr: any4, Port: 8080, To: to},
		{Proto: usernet.TCP, Addr: netip.IPv6Loopback(), Port: 8081, To: to},
		{Proto: usernet.TCP, Addr: netip.MustParseAddr("10.200.0.2"), Port: 8082, To: to},
	})
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]bool{
		"127.0.0.1:8080": true, "127.0.0.9:8080": true, "10.200.0.2:8080": true,
		"[::1]:8081": true, "10.200.0.2:8082": true,
		"127.0.0.1:8082": false, "127.0.0.1:8083": false,
		fmt.Sprintf("127.0.0.1:%d", to): false, fmt.Sprintf("[::1]:%d", to): false,
	} {
		if got := reaches(t, addr, conns); got != want {
			t.Errorf("%s reaches us: %t, want %t", addr, got, want)
		}
	}
	outside := func(addr string) (ok bool) {
		ns.Do(func() error { ok = reaches(t, addr, conns); return nil })
		return ok
	}
	if !outside("10.200.0.2:8080") || !outside("10.200.0.2:8082") || outside(fmt.Sprintf("10.200.0.2:%d", to)) {
		t.Error("from outside: the published ports should answer and the private one should not")
	}
}

func TestUDP(t *testing.T) {
	holder, err := net.ListenPacket("udp4", "0.0.0.0:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	ours, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	go func() {
		b := make([]byte, 100)
		for {
			n, from, err := ours.ReadFrom(b)
			if err != nil {
				return
			}
			ours.WriteTo([]byte(from.String()+" "+string(b[:n])), from)
		}
	}()
	to := uint16(ours.LocalAddr().(*net.UDPAddr).Port)
	var table redirect.Table
	defer table.Set("a", nil)
	if err := table.Set("a", []redirect.Port{{Proto: usernet.UDP, Addr: any4, Port: 5353, To: to}}); err != nil {
		t.Fatal(err)
	}
	ask := func(port uint16) (string, error) {
		c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return "", err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(300 * time.Millisecond))
		b := make([]byte, 100)
		if _, err := c.Write([]byte("knock")); err != nil {
			return "", err
		}
		n, err := c.Read(b)
		if want := c.LocalAddr().String() + " knock"; err == nil && string(b[:n]) != want {
			t.Errorf("answer %q, want %q", b[:n], want)
		}
		return string(b[:n]), err
	}
	if _, err := ask(5353); err != nil {
		t.Error(err)
	}
	if got, err := ask(to); err == nil {
		t.Errorf("the private port answers: %q", got)
	}
}

func TestOwners(t *testing.T) {
	before := nft(t, "list", "ruleset")
	var table redirect.Table
	set := func(owner string, ports ...redirect.Port) error { return table.Set(owner, ports) }
	port := func(n, to uint16) redirect.Port {
		return redirect.Port{Proto: usernet.TCP, Addr: any4, Port: n, To: to}
	}
	elements := func(want int) {
		t.Helper()
		if got := strings.Count(nft(t, "list", "map", "inet", "usernet-ports", "any4"), " : "); got != want+1 { // and the type
			t.Errorf("%d elements, want %d", got-1, want)
		}
	}
	if err := set("a", port(80, 1000), port(81, 1000), port(82, 1001)); err != nil {
		t.Fatal(err)
	}
	elements(3)
	if err := set("b", port(82, 1002)); !errors.Is(err, usernet.ErrPortTaken) || !strings.Contains(err.Error(), "by a") {
		t.Errorf("a port that a has: %v", err)
	}
	if err := set("b", port(83, 1003)); err != nil {
		t.Fatal(err)
	}
	if err := set("a", port(80, 1000), port(82, 1004)); err != nil { // one goes, one changes, and 1000 is still used
		t.Fatal(err)
	}
	elements(3)
	if got := nft(t, "list", "set", "inet", "usernet-ports", "private"); !strings.Contains(got, ". 1000") || strings.Contains(got, ". 1001") {
		t.Errorf("private ports: %s", got)
	}
	nft(t, "flush", "ruleset")
	if repaired, err := table.Check(); err != nil || !repaired {
		t.Errorf("after a flush: repaired %t, %v", repaired, err)
	}
	elements(3)
	nft(t, "flush", "map", "inet", "usernet-ports", "any4")
	if repaired, err := table.Check(); err != nil || !repaired {
		t.Errorf("after a flush of the map: repaired %t, %v", repaired, err)
	}
	if repaired, err := table.Check(); err != nil || repaired {
		t.Errorf("when all is well: repaired %t, %v", repaired, err)
	}
	nft(t, "delete", "table", "inet", "usernet-ports")
	if err := set("a", port(80, 1000)); err != nil {
		t.Errorf("after somebody deleted the table: %v", err)
	}
	elements(2)
	if err := errors.Join(set("a"), set("b"), set("c")); err != nil {
		t.Fatal(err)
	}
	if after := nft(t, "list", "ruleset"); after != before {
		t.Errorf("left behind: %s", after)
	}
	for _, bad := range []redirect.Port{{}, {Proto: usernet.SCTP, Addr: any4, Port: 1, To: 1}, {Proto: usernet.TCP, Addr: any4, Port: 1}, {Proto: usernet.TCP, Port: 1, To: 1}} {
		if err := set("bad", bad); !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestSweep(t *testing.T) {
	before := nft(t, "list", "ruleset")
	var killed, next redirect.Table
	if err := killed.Set("a", []redirect.Port{{Proto: usernet.TCP, Addr: any4, Port: 80, To: 1000}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := next.Sweep(); err != nil {
			t.Fatal(err)
		}
		if after := nft(t, "list", "ruleset"); after != before {
			t.Errorf("left behind: %s", after)
		}
	}
}

func TestManyPorts(t *testing.T) {
	var ports []redirect.Port
	for i := range uint16(5000) {
		ports = append(ports, redirect.Port{Proto: usernet.TCP, Addr: any4, Port: 20000 + i, To: 30000 + i},
			redirect.Port{Proto: usernet.UDP, Addr: any6, Port: 20000 + i, To: 30000 + i},
			redirect.Port{Proto: usernet.UDP, Addr: lo4, Port: 20000 + i, To: 30000 + i})
	}
	var table redirect.Table
	start := time.Now()
	if err := table.Set("a", ports); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d ports in %v", len(ports), time.Since(start))
	if repaired, err := table.Check(); err != nil || repaired {
		t.Errorf("repaired %t, %v", repaired, err)
	}
	if err := table.Set("a", ports[:7000]); err != nil {
		t.Fatal(err)
	}
	if repaired, err := table.Check(); err != nil || repaired {
		t.Errorf("repaired %t, %v", repaired, err)
	}
	if err := table.Set("a", nil); err != nil {
		t.Fatal(err)
	}
}
