package forward

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/usernet/usernet/driver/gvproxy"
)

// udpMachine is a UDP server on the loopback that sends datagrams back.
func udpMachine(t testing.TB, host string) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	pc.(*net.UDPConn).SetReadBuffer(4 << 20)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, maxDatagram)
		for {
			n, from, err := pc.ReadFrom(buffer)
			if err != nil {
				return
			}
			pc.WriteTo(buffer[:n], from)
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
	return pc.LocalAddr().String()
}

// askUDP sends datagrams until an answer comes.
func askUDP(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	buffer := make([]byte, maxDatagram)
	for range 100 {
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(patience / 100))
		n, err := conn.Read(buffer)
		if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
			continue
		}
		if err != nil || string(buffer[:n]) != text {
			t.Fatalf("answer %.40q, %v, want %.40q", buffer[:n], err, text)
		}
		return
	}
	t.Fatalf("no answer to %.40q", text)
}

func TestUDP(t *testing.T) {
	for _, tt := range []struct{ name, local, dial, target string }{
		{"IPv4", "127.0.0.1", "127.0.0.1", "127.0.0.1"},
		{"IPv6", "::1", "::1", "::1"},
		{"everywhere, IPv4", "", "127.0.0.1", "::1"},
		{"everywhere, IPv6", "", "::1", "127.0.0.1"},
		{"everywhere by address", "0.0.0.0", "::1", "127.0.0.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			noLeaks(t)
			local := freePort(t, tt.local)
			n := newFake()
			f := start(t, n, gvproxy.UDP, local, udpMachine(t, tt.target), nil)
			conn := dial(t, "udp", port(t, tt.dial, local))
			askUDP(t, conn, "hello")
			if got, want := <-n.clients, conn.LocalAddr().(*net.UDPAddr).AddrPort(); got != want {
				t.Errorf("client %s, want %s", got, want)
			}
			for _, size := range []int{0, 1, 1500, 65507} {
				askUDP(t, conn, strings.Repeat("x", size))
			}
			askUDP(t, dial(t, "udp", port(t, tt.dial, local)), "another")
			if got, want := f.Stats(), (Stats{Active: 2, Accepted: 2}); got != want {
				t.Errorf("stats %+v, want %+v", got, want)
			}
			closeSoon(t, f)
		})
	}
}

// TestUDPBurst: what is read in batches keeps its order and its bounds, and goes to the flow of its client.
func TestUDPBurst(t *testing.T) {
	noLeaks(t)
	local := freePort(t, "")
	start(t, newFake(), gvproxy.UDP, local, udpMachine(t, "127.0.0.1"), nil)
	at := port(t, "127.0.0.1", local)
	conns := []net.Conn{dial(t, "udp", at), dial(t, "udp", at), dial(t, "udp", at)}
	buffer := make([]byte, maxDatagram)
	for round := range 5 {
		for i := range 20 {
			for c, conn := range conns {
				conn.Write(bytes.Repeat([]byte{byte(c), byte(round), byte(i)}, 1+i*7))
			}
		}
		for c, conn := range conns {
			for i := range 20 {
				n, err := conn.Read(buffer)
				if want := bytes.Repeat([]byte{byte(c), byte(round), byte(i)}, 1+i*7); err != nil || !bytes.Equal(buffer[:n], want) {
					t.Fatalf("round %d, client %d, datagram %d: %d bytes %.9v, %v, want %d bytes %.9v", round, c, i, n, buffer[:n], err, len(want), want)
				}
			}
		}
	}
}

// streaming has datagrams carried without a buffer of the reader's.
type streaming struct{ net.Conn }

func (s streaming) Read([]byte) (int, error) { panic("Read of an io.WriterTo") }

func (s streaming) WriteTo(w io.Writer) (n int64, err error) {
	buffer := make([]byte, maxDatagram)
	for {
		size, err := s.Conn.Read(buffer)
		if err != nil {
			return n, err
		}
		w.Write(buffer[:size])
		n += int64(size)
	}
}

func TestUDPWriterTo(t *testing.T) {
	noLeaks(t)
	n := newFake()
	n.wrapUDP = func(c net.Conn) net.Conn { return streaming{c} }
	local := freePort(t, "127.0.0.1")
	f := start(t, n, gvproxy.UDP, local, udpMachine(t, "127.0.0.1"), func(l *limits) { l.idle = 200 * time.Millisecond })
	askUDP(t, dial(t, "udp", local), "hello")
	eventually(t, "the flow ends", func() bool { return f.Stats() == Stats{Accepted: 1} })
	askUDP(t, dial(t, "udp", local), "hello")
}

func TestUDPIdle(t *testing.T) {
	noLeaks(t)
	local := freePort(t, "127.0.0.1")
	const idle = 300 * time.Millisecond
	f := start(t, newFake(), gvproxy.UDP, local, udpMachine(t, "127.0.0.1"), func(l *limits) { l.idle = idle })
	conn := dial(t, "udp", local)
	begin := time.Now()
	for time.Since(begin) < 3*idle {
		askUDP(t, conn, "hello")
		time.Sleep(idle / 10)
	}
	// On a busy machine a pause may have been a long one.
	if n := f.Stats().Accepted; n > 2 {
		t.Errorf("%d flows for a client that is not idle", n)
	}
	last := time.Now()
	eventually(t, "the flow ends", func() bool { return f.Stats().Active == 0 })
	if d := time.Since(last); d < idle/2 {
		t.Errorf("it ended after %v", d)
	}
	askUDP(t, conn, "again")
}

func TestUDPLimit(t *testing.T) {
	noLeaks(t)
	local := freePort(t, "127.0.0.1")
	f := start(t, newFake(), gvproxy.UDP, local, udpMachine(t, "127.0.0.1"), func(l *limits) { l.flows = 3 })
	for range 10 {
		askUDP(t, dial(t, "udp", local), "hello")
	}
	eventually(t, "three are left", func() bool { return f.Stats() == Stats{Active: 3, Accepted: 10} })
}

// TestUDPRefused: that nothing listens in the machine yet does not end the flow.
func TestUDPRefused(t *testing.T) {
	noLeaks(t)
	target := freePort(t, "127.0.0.1")
	local := freePort(t, "127.0.0.1")
	n := newFake()
	f := start(t, n, gvproxy.UDP, local, target, nil)
	conn := dial(t, "udp", local)
	for range 3 {
		conn.Write([]byte("hello"))
		eventually(t, "the flow is there", func() bool { return f.Stats().Active == 1 })
	}
	pc, err := net.ListenPacket("udp", target)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	conn.Write([]byte("again"))
	pc.SetDeadline(time.Now().Add(patience))
	for buffer := make([]byte, 10); ; {
		n, _, err := pc.ReadFrom(buffer)
		if err != nil {
			t.Fatal(err)
		}
		if string(buffer[:n]) == "again" { // a "hello" may come late
			break
		}
	}
	if got, want := f.Stats(), (Stats{Active: 1, Accepted: 1}); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

func TestFlowTable(t *testing.T) {
	now := time.Now()
	at := func(s int) time.Time { return now.Add(time.Duration(s) * time.Second) }
	table := newFlowTable(2, 90*time.Second)
	client := func(port uint16) flowKey {
		return flowKey{client: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port)}
	}
	a, b, c := &flow{key: client(1)}, &flow{key: client(2)}, &flow{key: client(3)}
	if table.add(a, at(0)) != nil || table.add(b, at(1)) != nil {
		t.Error("evicted while there is room")
	}
	if table.use(client(1), at(2)) != a || table.use(client(3), at(2)) != nil {
		t.Error("found another flow")
	}
	if table.add(c, at(3)) != b || table.has(b) || table.use(client(2), at(3)) != nil {
		t.Error("the idlest was not evicted")
	}
	if d := table.left(a, at(32)); d != 60*time.Second {
		t.Errorf("left %v, want 1m0s", d)
	}
	table.touch(b, at(40)) // is out
	table.remove(b)
	table.remove(a)
	if table.has(a) || len(table.flows) != 1 || table.order.Len() != 1 || table.use(client(3), at(50)) != c {
		t.Errorf("after all: %v", table.flows)
	}
}

func FuzzDestination(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		s := socket{v6: v6}
		for _, a := range []string{"192.0.2.1", "2001:db8::1", "fe80::1"} {
			f.Add(v6, s.source(local{netip.MustParseAddr(a), 3}))
		}
	}
	f.Fuzz(func(t *testing.T, v6 bool, control []byte) {
		s := socket{v6: v6, anywhere: true}
		from, ok := s.destination(control)
		if again, ok2 := s.destination(control); again != from || ok2 != ok {
			t.Errorf("%v, %v, and at the second time %v, %v", from, ok, again, ok2)
		}
		if from.addr.IsValid() && from.addr.Is4() == v6 {
			t.Errorf("%v of the other family", from)
		}
		s.source(from)
	})
}
