package vmnet

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/usernet/usernet/usermode/l2"
)

// TestPortsAreShared: the relays dialled from a port that they had bound before, which is then nobody else's. All connections of all
// machines, to wherever, had to do with the 28 232 ports that Linux chooses from. One that connect(2) chooses may be had again for another
// destination.
func TestPortsAreShared(t *testing.T) {
	b := newBed(t, testConfig(t))
	m := b.machine(2, l2.Usernet)
	hold := func(c net.Conn) {
		var end [1]byte
		c.Read(end[:])
	}
	var to []netip.AddrPort
	for range 3 {
		to = append(to, (*machine)(nil).listen(t, netip.AddrPortFrom(host4.Addr(), 0), hold))
	}
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	was, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(file, was, 0o644) })
	if err := os.WriteFile(file, []byte("20000 20003"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, to := range to {
		for i := range 4 {
			c, err := m.dial("tcp", to)
			if err != nil {
				t.Fatalf("connection %d to %s: %v", i+1, to, err)
			}
			defer c.Close()
		}
	}
}
