package flows

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A flow makes room, the host gives its port to another guest's flow to the same server, and then the answer comes: that guest used to
// get it.
func TestLateAnswer(t *testing.T) {
	const guests = 50
	setSysctl(t, "net/ipv4/ip_local_port_range", "40001 40064")
	server, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 39999})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	server.SetDeadline(time.Now().Add(patience))
	n := start(t, func(f *Flows) { f.udp.total = 1 })
	dst := netip.AddrPortFrom(alias4, 39999)
	asked := make(map[string]netip.AddrPort) // by what they asked
	for i := range guests {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 127, byte(2 + i)}), 53)
		n.send(client, dst, 64, []byte(client.String()))
		b := make([]byte, 100)
		k, from, err := server.ReadFromUDPAddrPort(b)
		if err != nil {
			t.Fatal(err)
		}
		asked[string(b[:k])] = from
	}
	if s := n.Stats(); s.Flows != 1 || s.Evicted != guests-1 {
		t.Fatalf("%d flows, %d evicted", s.Flows, s.Evicted)
	}
	for text, to := range asked {
		if _, err := server.WriteToUDPAddrPort([]byte(text), to); err != nil {
			t.Fatal(err)
		}
	}
	for range guests {
		if a := next(t, n.datagrams); a.to.String() != string(a.payload) {
			t.Errorf("%s gets what %s asked for", a.to, a.payload)
		}
	}
}

// Flows that rest are closed in time, when there are many, and when sockets or ports are wanted.
func TestRestEnds(t *testing.T) {
	server := echoServer(t, local4)
	dst := netip.AddrPortFrom(alias4, server.Port())
	n := start(t, func(f *Flows) { f.udp.total = 1 })
	resting := func() int {
		n.udp.mu.Lock()
		defer n.udp.mu.Unlock()
		return len(n.udp.resting)
	}
	ask := func(port uint16) {
		t.Helper()
		client := netip.AddrPortFrom(guest4, port)
		n.send(client, dst, 64, []byte("x"))
		if a := next(t, n.datagrams); a.to != client {
			t.Errorf("an answer for %s, want one for %s", a.to, client)
		}
	}
	for i := range uint16(maxResting + 100) {
		ask(1 + i)
	}
	if got := resting(); got != maxResting {
		t.Errorf("%d flows rest, want %d", got, maxResting)
	}
	n.udp.mu.Lock()
	for i := range n.udp.resting {
		n.udp.resting[i].until = 0
	}
	n.udp.mu.Unlock()
	await(t, func() bool { return resting() == 0 })

	setSysctl(t, "net/ipv4/ip_local_port_range", "40001 40008")
	for i := range uint16(100) {
		ask(5000 + i)
	}
	if s := n.Stats(); s.Refused != 0 || resting() > 8 {
		t.Errorf("%+v, %d flows rest; of eight ports", s, resting())
	}
}

// Without ports, what has been idle makes room: connect(2) says EAGAIN then.
func TestNoPortsLeft(t *testing.T) {
	server := echoServer(t, local4)
	setSysctl(t, "net/ipv4/ip_local_port_range", "40001 40016")
	n := start(t, nil)
	dst := netip.AddrPortFrom(alias4, server.Port())
	for i := range 100 {
		client := netip.AddrPortFrom(guest4, uint16(i+1))
		n.send(client, dst, 64, []byte("x"))
		if a := next(t, n.datagrams); a.to != client {
			t.Fatalf("an answer for %s, want one for %s", a.to, client)
		}
	}
	if s := n.Stats(); s.Evicted == 0 || s.Refused != 0 {
		t.Errorf("stats %+v", s)
	}
}

// What a socket has received before it is connected stays in it: from anybody.
func TestConnectForgets(t *testing.T) {
	stranger, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	peer := netip.MustParseAddrPort(echoServer(t, local4).String())
	for _, forgets := range []bool{false, true} {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, &unix.SockaddrInet4{}); err != nil { // as connect(2) begins
			t.Fatal(err)
		}
		port, err := boundPort(fd)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := stranger.WriteToUDPAddrPort([]byte("for another"), netip.AddrPortFrom(local4, port)); err != nil {
				t.Fatal(err)
			}
		}
		to := &unix.SockaddrInet4{Port: int(peer.Port()), Addr: peer.Addr().As4()}
		connect := unix.Connect
		if forgets {
			connect = connectTo
		}
		if err := connect(fd, to); err != nil {
			t.Fatal(err)
		}
		_, err = unix.Read(fd, make([]byte, 100))
		if got := err == unix.EAGAIN; got != forgets {
			t.Errorf("read: %v; connectTo %t", err, forgets)
		}
	}
}
