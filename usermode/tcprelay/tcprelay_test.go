package tcprelay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/pipe"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const nic = 1

var (
	clientAddr = tcpip.AddrFrom4([4]byte{10, 200, 8, 2})
	other      = tcpip.AddrFrom4([4]byte{192, 0, 2, 1}) // what clients dial: the host's loopback
	refused    = tcpip.AddrFrom4([4]byte{192, 0, 2, 2})
)

// bed is a netstack with relays and another one, the client's, on the other end of its link.
type bed struct {
	client, stack *stack.Stack
	relays        *Relays
}

func newBed(t testing.TB, limits Limits) *bed {
	a, c := pipe.New("\x02\x00\x00\x00\x00\x01", "\x02\x00\x00\x00\x00\x02", 1500)
	b := &bed{stack: newStack(t, a), client: newStack(t, c)}
	protocolAddr := tcpip.ProtocolAddress{
		Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: clientAddr, PrefixLen: 24},
	}
	if err := b.client.AddProtocolAddress(nic, protocolAddr, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(wrap(b.stack.SetPromiscuousMode(nic, true)), wrap(b.stack.SetSpoofing(nic, true)), setOptions(b.stack)); err != nil {
		t.Fatal(err)
	}
	b.relays = New(b.stack, Config{NIC: nic, Limits: limits, Log: slog.New(slog.DiscardHandler), Resolve: func(a netip.Addr) (netip.Addr, bool) {
		return netip.MustParseAddr("127.0.0.1"), a == addrOf(other)
	}})
	b.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, b.relays.HandlePacket)
	t.Cleanup(func() {
		b.relays.Close()
		for _, st := range []*stack.Stack{b.stack, b.client} {
			st.Close()
			st.Wait()
		}
		b.relays.Wait()
		a.Wait()
		c.Wait()
	})
	return b
}

func newStack(t testing.TB, link stack.LinkEndpoint) *stack.Stack {
	t.Helper()
	st := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if err := st.CreateNIC(nic, noResolution{link}); err != nil {
		t.Fatal(err)
	}
	st.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}})
	return st
}

// noResolution is a link whose other end is the only one.
type noResolution struct{ stack.LinkEndpoint }

func (noResolution) Capabilities() stack.LinkEndpointCapabilities { return stack.CapabilityNone }

func wrap(err tcpip.Error) error {
	if err == nil {
		return nil
	}
	return errors.New(err.String())
}

// dial connects as the client.
func (b *bed) dial(to tcpip.Address, port int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := gonet.DialContextTCP(ctx, b.client, tcpip.FullAddress{NIC: nic, Addr: to, Port: uint16(port)}, ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	return c, nil
}

// noise is n bytes that are the same for the same seed.
func noise(seed byte, n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{seed}), n)
}

func sum(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if n, err := io.Copy(h, r); err != nil {
		t.Errorf("after %d bytes: %v", n, err)
	}
	return string(h.Sum(nil))
}

// listen accepts one connection for a test.
func listen(t testing.TB, network, address string) (net.Listener, <-chan net.Conn) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(time.Minute))
			accepted <- c
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l, accepted
}

// opaque is a connection that is nothing but that.
type opaque struct{ net.Conn }

func (o opaque) CloseWrite() error { return o.Conn.(*net.TCPConn).CloseWrite() }

// TestJoin has both directions at once, every byte checked, with every kind of connection on the host's side.
func TestJoin(t *testing.T) {
	for name, pair := range map[string]func(t *testing.T) (near, far net.Conn){
		"tcp":  func(t *testing.T) (near, far net.Conn) { return connected(t, "tcp", "127.0.0.1:0") },
		"unix": func(t *testing.T) (near, far net.Conn) { return connected(t, "unix", filepath.Join(t.TempDir(), "s")) },
		"other": func(t *testing.T) (near, far net.Conn) {
			near, far = connected(t, "tcp", "127.0.0.1:0")
			return opaque{near}, far
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, Limits{})
			near, far := pair(t)
			guest := b.joined(t, near)
			const size = 8 << 20
			var wg sync.WaitGroup
			for i, c := range []net.Conn{far, guest} {
				wg.Go(func() {
					if _, err := io.Copy(c, noise(byte(i), size)); err != nil {
						t.Error(err)
					}
					c.(interface{ CloseWrite() error }).CloseWrite()
				})
			}
			if sum(t, far) != sum(t, noise(1, size)) {
				t.Error("what the client sent did not arrive")
			}
			if sum(t, guest) != sum(t, noise(0, size)) {
				t.Error("what the host sent did not arrive")
			}
			wg.Wait()
			far.Close()
			guest.Close()
		})
	}
}

// connected is a pair of connected sockets.
func connected(t *testing.T, network, address string) (near, far net.Conn) {
	t.Helper()
	l, accepted := listen(t, network, address)
	far, err := net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far.SetDeadline(time.Now().Add(time.Minute))
	near = <-accepted
	near.SetDeadline(time.Time{})
	return near, far
}

// joined connects to the client and joins that with host. It returns the client's end.
func (b *bed) joined(t *testing.T, host net.Conn) net.Conn {
	t.Helper()
	l, err := gonet.ListenTCP(b.client, tcpip.FullAddress{NIC: nic, Addr: clientAddr, Port: 80}, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	queue := new(waiter.Queue)
	ep, terr := b.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, queue)
	if terr != nil {
		t.Fatal(terr)
	}
	if terr := ep.Bind(tcpip.FullAddress{NIC: nic, Addr: other}); terr != nil {
		t.Fatal(terr)
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&entry)
	if terr := ep.Connect(tcpip.FullAddress{NIC: nic, Addr: clientAddr, Port: 80}); terr != nil {
		if _, started := terr.(*tcpip.ErrConnectStarted); !started {
			t.Fatal(terr)
		}
	}
	guest, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	<-ready
	queue.EventUnregister(&entry)
	var wg sync.WaitGroup
	wg.Go(func() { b.relays.Join(t.Context(), ep, queue, host) })
	t.Cleanup(wg.Wait)
	guest.SetDeadline(time.Now().Add(time.Minute))
	return guest
}

// TestJoinWithoutCloseWrite: a host that cannot be told of an end is closed.
func TestJoinWithoutCloseWrite(t *testing.T) {
	b := newBed(t, Limits{})
	near, far := net.Pipe()
	guest := b.joined(t, near)
	go func() {
		guest.Write([]byte("all that there is"))
		guest.(*gonet.TCPConn).CloseWrite()
	}()
	far.SetDeadline(time.Now().Add(time.Minute))
	if got, err := io.ReadAll(far); string(got) != "all that there is" || err != nil {
		t.Errorf("host got %q, %v", got, err)
	}
}

// TestClose: it resets both ends.
func TestClose(t *testing.T) {
	b := newBed(t, Limits{})
	near, far := connected(t, "tcp", "127.0.0.1:0")
	guest := b.joined(t, near)
	b.relays.Close()
	for name, c := range map[string]net.Conn{"host": far, "client": guest} {
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF || !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: %v, want a reset", name, err)
		}
	}
	far.Close()
	near2, far2 := net.Pipe()
	b.relays.Join(t.Context(), b.endpoint(t), new(waiter.Queue), near2)
	if _, err := far2.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("joined after Close: %v", err)
	}
}

func (b *bed) endpoint(t *testing.T) tcpip.Endpoint {
	ep, err := b.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, new(waiter.Queue))
	if err != nil {
		t.Fatal(err)
	}
	return ep
}

// TestDial: a client's connections are dialled on the host, or refused.
func TestDial(t *testing.T) {
	b := newBed(t, Limits{Conns: 3, ClientConns: 2})
	l, accepted := listen(t, "tcp", "127.0.0.1:0")
	port := l.Addr().(*net.TCPAddr).Port
	if c, err := b.dial(refused, port); err == nil {
		t.Error("an address that is not for clients was dialled")
		c.Close()
	}
	for b.relays.Stats() != (Stats{}) { // the reset was sent before the refused one was over
		time.Sleep(time.Millisecond)
	}
	for range 2 {
		c, err := b.dial(other, port)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		host := <-accepted
		defer host.Close()
		want := []byte("hello")
		c.Write(want)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(host, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("host got %q, %v", got, err)
		}
	}
	if c, err := b.dial(other, port); err == nil {
		t.Error("a third connection of a client that may have two")
		c.Close()
	}
	if st := b.relays.Stats(); st.Conns != 2 || st.Refused != 1 || st.Pending != 0 {
		t.Errorf("%+v, want two connections and one refused", st)
	}
}

// With many connections, each gets less: netstack has no limit for all of them together.
func TestBuffersShrink(t *testing.T) {
	b := newBed(t, Limits{})
	limit := func() int {
		var o tcpip.TCPReceiveBufferSizeRangeOption
		if err := b.stack.TransportProtocolOption(tcp.ProtocolNumber, &o); err != nil {
			t.Fatal(err)
		}
		return o.Max
	}
	for _, c := range []struct{ change, want int }{
		{1, receiveMax},
		{manyConns - 2, receiveMax},
		{1, receiveMax / 2},
		{-1, receiveMax / 2}, // not back at once
		{MaxConns, receiveMax >> maxLevel},
		{-MaxConns, receiveMax},
		{1, receiveMax / 2},
		{-manyConns, receiveMax},
	} {
		if b.relays.account(c.change); limit() != c.want {
			t.Errorf("%d connections: %d bytes, want %d", b.relays.conns, limit(), c.want)
		}
	}
}
