package tcprelay

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// held is a connection of the host's that takes nothing until it is let go.
type held struct {
	opaque
	writes, release chan struct{}
}

func (h held) Write(b []byte) (int, error) {
	close(h.writes)
	<-h.release
	return h.opaque.Write(b)
}

func (h held) SetLinger(sec int) error { return h.Conn.(*net.TCPConn).SetLinger(sec) }

// TestOpensLeavesData: a connection in TIME-WAIT, whose last bytes are still on their way to the host, does not make way for the next.
func TestOpensLeavesData(t *testing.T) {
	b := newBed(t, Limits{})
	long := tcpip.TCPTimeWaitTimeoutOption(time.Minute)
	if err := b.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &long); err != nil {
		t.Fatal(err)
	}
	near, far := connected(t, "tcp", "127.0.0.1:0")
	h := held{opaque{near}, make(chan struct{}), make(chan struct{})}
	guest := b.joined(t, h)
	if err := far.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(guest); len(got) != 0 || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := guest.Write([]byte("late")); err != nil {
		t.Fatal(err)
	}
	client, dst := addrPort(guest.LocalAddr()), addrPort(guest.RemoteAddr())
	if err := guest.(*gonet.TCPConn).Close(); err != nil {
		t.Fatal(err)
	}
	<-h.writes
	ep := b.relays.find(stack.TransportEndpointID{
		LocalAddress: other, LocalPort: dst.Port(), RemoteAddress: clientAddr, RemotePort: client.Port(),
	}).(*tcp.Endpoint)
	for deadline := time.Now().Add(20 * time.Second); tcp.EndpointState(ep.State()) != tcp.StateTimeWait; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("state is %s", tcp.EndpointState(ep.State()))
		}
	}
	b.relays.Opens(client, dst)
	close(h.release)
	if got, err := io.ReadAll(far); string(got) != "late" || err != nil {
		t.Errorf("host got %q, %v", got, err)
	}
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }
