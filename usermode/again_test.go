package usermode

import (
	"net"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/usernet/usernet/internal/nettest"
)

// TestPortAgain: netstack's TIME-WAIT, which lasts longer here than anybody waits, is in nobody's way.
func TestPortAgain(t *testing.T) {
	b := newBed(t, usual)
	for b.netstack.carrier.Load() == nil { // it has only just begun to run
		time.Sleep(time.Millisecond)
	}
	long := tcpip.TCPTimeWaitTimeoutOption(time.Minute)
	if err := b.netstack.carrier.Load().stack.SetTransportProtocolOption(tcp.ProtocolNumber, &long); err != nil {
		t.Fatal(err)
	}
	to := listenTCP(t, host4.Addr(), func(c *net.TCPConn) { c.Write([]byte("x")) })
	nettest.PortAgain(t, b.container, to)
	to = listenTCP(t, host6.Addr(), func(c *net.TCPConn) { c.Write([]byte("x")) })
	nettest.PortAgain(t, b.container, to)
}
