package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A stream whose other end has vanished is not always known to have ended: the hypervisor's device may not tell. So when nothing is heard
// of the gateway though something was sent to it, it is asked for its Ethernet address, which every gateway answers.
const (
	lookEvery = 5 * time.Second
	// maxUnheard is how many looks in a row may find that nothing was heard since the gateway was asked.
	maxUnheard = 3
	// idleLooks is how many looks nothing may be heard, and nothing be sent, before it is asked all the same: whoever has only ports
	// that others dial sends nothing.
	idleLooks = 12
)

// traffic counts what passed the stream, in batches.
type traffic struct{ sent, heard atomic.Uint64 }

// watch returns an error when the gateway is not heard any more, or ctx is done.
func (t *traffic) watch(ctx context.Context, every time.Duration, ask func() error) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	sent, heard := t.sent.Load(), t.heard.Load()
	asked, idle := 0, 0
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if now := t.heard.Load(); now != heard {
			sent, heard, asked, idle = t.sent.Load(), now, 0, 0
			continue
		}
		if idle++; asked == 0 && t.sent.Load() == sent && idle < idleLooks {
			continue
		}
		if asked == maxUnheard {
			return fmt.Errorf("nothing was heard of it for %s", time.Duration(idle)*every)
		}
		if ask() == nil { // else it is not known whom to ask, or the machine cannot
			asked++
		}
	}
}

var errNobody = errors.New("there is no gateway to ask")

// askGateway asks by ARP for the address of the router behind an interface. The answer is the kernel's.
func askGateway(link netlink.Link) error {
	router, own, err := routerOf(link)
	if err != nil {
		return err
	}
	iface, err := net.InterfaceByIndex(link.Attrs().Index)
	if err != nil {
		return err
	}
	conn, err := packet.Listen(iface, packet.Datagram, unix.ETH_P_ARP, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.WriteTo(arpRequest(iface.HardwareAddr, own, router), &packet.Addr{HardwareAddr: everybody})
	return err
}

var everybody = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// routerOf is the router of a route by an interface, and the interface's address.
func routerOf(link netlink.Link) (router, own netip.Addr, err error) {
	routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
	if err != nil {
		return router, own, err
	}
	for _, r := range routes {
		if via, ok := netip.AddrFromSlice(r.Gw.To4()); ok {
			router = via
		}
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return router, own, err
	}
	if !router.IsValid() || len(addrs) == 0 {
		return router, own, errNobody
	}
	own, _ = netip.AddrFromSlice(addrs[0].IP.To4())
	return router, own, nil
}

// arpRequest is the question who has an address (RFC 826).
func arpRequest(mac net.HardwareAddr, own, whose netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 1} // Ethernet, IPv4, lengths of their addresses, a request
	b = append(append(b, mac...), own.AsSlice()...)
	return append(append(b, make([]byte, 6)...), whose.AsSlice()...)
}
