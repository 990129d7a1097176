package endpoint_test

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/nettest"
)

// What a container sent in the first moment after Attach was answered a second later: the bridge's end of its link was not up
// yet and dropped the answer to its ARP request.
func TestFirstPacketIsAnswered(t *testing.T) {
	s := open(t, endpoint.Config{Network: network(usernet.Bridge)})
	for range 20 {
		ep := endpointOf(network(usernet.Bridge), 2)
		ep.IfName = "eth0"
		ns := nettest.NewNS(t)
		l, err := s.Attach(ep, endpoint.Place{Netns: ns, Addresses: []netip.Prefix{ep.Addr4}, Gateways: []netip.Addr{gateway}})
		if err != nil {
			t.Fatal(err)
		}
		err = ns.Do(func() error {
			// Shorter than the repetition of an ARP request, after a second, far longer than anything else there.
			_, err := net.DialTimeout("tcp", netip.AddrPortFrom(gateway, 1).String(), 900*time.Millisecond)
			return err
		})
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial the gateway: %v, want refused", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
