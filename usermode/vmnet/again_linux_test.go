package vmnet

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/usernet/usernet/internal/nettest"
	"github.com/usernet/usernet/usermode/l2"
)

// TestPortAgain: netstack's TIME-WAIT, which lasts longer here than anybody waits, is in nobody's way.
func TestPortAgain(t *testing.T) {
	b := newBed(t, testConfig(t))
	long := tcpip.TCPTimeWaitTimeoutOption(time.Minute)
	if err := b.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &long); err != nil {
		t.Fatal(err)
	}
	m := b.machine(2, l2.Usernet)
	m.addr6()
	for _, host := range []netip.Addr{host4.Addr(), host6.Addr()} {
		to := (*machine)(nil).listen(t, netip.AddrPortFrom(host, 0), func(c net.Conn) { c.Write([]byte("x")); c.Close() })
		nettest.PortAgain(t, m.ns, to)
	}
}
