package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/usermode/l2"
)

// wire is a server behind an interface.
type wire struct {
	iface string
	mac   l2.MAC
}

// Five attempts in some seconds: 1/4, 1/2, 1, 2, 4. The first one may be lost, since the kernel is late in sending after a carrier has come.
var attempts = []nclient4.ClientOpt{nclient4.WithTimeout(time.Second / 4), nclient4.WithRetry(5)}

var wanted = dhcpv4.WithRequestedOptions(
	dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionDomainNameServer,
	dhcpv4.OptionDomainName, dhcpv4.OptionDNSDomainSearchList, dhcpv4.OptionInterfaceMTU,
	dhcpv4.OptionIPAddressLeaseTime, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue,
)

func (w *wire) acquire(ctx context.Context, was netip.Addr) (lease, error) {
	c, err := w.broadcaster()
	if err != nil {
		return lease{}, err
	}
	defer c.Close()
	ask := []dhcpv4.Modifier{wanted}
	if was.IsValid() {
		ask = append(ask, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(was.AsSlice())))
	}
	offer, err := c.DiscoverOffer(ctx, ask...)
	if err != nil {
		return lease{}, err
	}
	began := time.Now()
	l, err := c.RequestFromOffer(ctx, offer, wanted)
	if err != nil {
		return lease{}, err
	}
	return newLease(l.ACK, began)
}

func (w *wire) extend(ctx context.Context, l lease, anybody bool) (lease, error) {
	c, to, err := w.clientFor(l, anybody)
	if err != nil {
		return lease{}, err
	}
	defer c.Close()
	request, err := dhcpv4.NewRenewFromAck(l.state.(*dhcpv4.DHCPv4), wanted)
	if err != nil {
		return lease{}, err
	}
	began := time.Now()
	answer, err := c.SendAndRead(ctx, to, request, nclient4.IsMessageType(dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak))
	if err != nil {
		return lease{}, err
	}
	if answer.MessageType() == dhcpv4.MessageTypeNak {
		return lease{}, fmt.Errorf("%w: %s", errRefused, answer.Message())
	}
	return newLease(answer, began)
}

// clientFor asks who has given the lease from the address that it is for, and anybody by broadcast.
func (w *wire) clientFor(l lease, anybody bool) (*nclient4.Client, *net.UDPAddr, error) {
	if anybody {
		c, err := w.broadcaster()
		return c, nclient4.DefaultServers, err
	}
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: l.addr.Addr().AsSlice(), Port: nclient4.ClientPort})
	if err != nil {
		return nil, nil, err
	}
	c, err := nclient4.NewWithConn(conn, w.mac[:], attempts...)
	return c, &net.UDPAddr{IP: l.server.AsSlice(), Port: nclient4.ServerPort}, err
}

// broadcaster is a client on an interface that has no address. It sees packets of the machine's, so it should not live long.
func (w *wire) broadcaster() (*nclient4.Client, error) {
	iface, err := net.InterfaceByName(w.iface)
	if err != nil {
		return nil, err
	}
	filter, err := bpf.Assemble(toClient)
	if err != nil {
		return nil, err
	}
	raw, err := packet.Listen(iface, packet.Datagram, unix.ETH_P_IP, &packet.Config{Filter: filter})
	if err != nil {
		return nil, err
	}
	conn := nclient4.NewBroadcastUDPConn(raw, &net.UDPAddr{Port: nclient4.ClientPort})
	return nclient4.NewWithConn(conn, w.mac[:], attempts...)
}

// toClient passes unfragmented UDP to a DHCP client's port.
var toClient = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 9, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 5},
	bpf.LoadAbsolute{Off: 6, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x3fff, SkipTrue: 3},
	bpf.LoadMemShift{Off: 0},
	bpf.LoadIndirect{Off: 2, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: nclient4.ClientPort, SkipTrue: 1},
	bpf.RetConstant{Val: 0},
	bpf.RetConstant{Val: 65535},
}

// forever is the time of a lease without an end.
const forever = time.Duration(1<<32-1) * time.Second

var errLease = errors.New("answer that makes no sense")

// newLease reads an acknowledgement.
func newLease(ack *dhcpv4.DHCPv4, began time.Time) (lease, error) {
	addr, ok := address(ack.YourIPAddr)
	if !ok {
		return lease{}, fmt.Errorf("address %s: %w", ack.YourIPAddr, errLease)
	}
	bits, size := ack.SubnetMask().Size()
	if size != 32 {
		bits = 32
	}
	l := lease{began: began, state: ack}
	l.addr = netip.PrefixFrom(addr, bits)
	l.server, _ = address(ack.ServerIdentifier())
	l.routes = routes(ack)
	for _, ip := range ack.DNS() {
		if a, ok := address(ip); ok && !slices.Contains(l.dns, a) {
			l.dns = append(l.dns, a)
		}
	}
	if labels := ack.DomainSearch(); labels != nil {
		l.search = domains(labels.Labels)
	}
	if len(l.search) == 0 {
		l.search = domains([]string{ack.DomainName()})
	}
	if mtu := ack.Options.Get(dhcpv4.OptionInterfaceMTU); len(mtu) == 2 {
		l.mtu = min(int(mtu[0])<<8|int(mtu[1]), maxMTU)
	}
	if l.mtu < minMTU {
		l.mtu = 0
	}
	l.renew, l.rebind, l.expires = times(ack)
	return l, nil
}

// routes are those that the server tells: in classless form, which replaces the other one (RFC 3442), or a default route.
func routes(ack *dhcpv4.DHCPv4) []route {
	var list []route
	for _, r := range ack.ClasslessStaticRoute() {
		ip, ok := netip.AddrFromSlice(r.Dest.IP.To4())
		bits, size := r.Dest.Mask.Size()
		if !ok || size != 32 {
			continue
		}
		via, _ := address(r.Router) // 0.0.0.0: on the link
		if one := (route{netip.PrefixFrom(ip, bits).Masked(), via}); !slices.Contains(list, one) {
			list = append(list, one)
		}
	}
	// What is on the link first: others may go by it.
	slices.SortStableFunc(list, func(a, b route) int {
		switch {
		case a.via.IsValid() == b.via.IsValid():
			return 0
		case b.via.IsValid():
			return -1
		}
		return 1
	})
	if len(list) > 0 || len(ack.Router()) == 0 {
		return list
	}
	if via, ok := address(ack.Router()[0]); ok {
		list = append(list, route{netip.PrefixFrom(netip.IPv4Unspecified(), 0), via})
	}
	return list
}

// times are the lease's, with the defaults of RFC 2131, section 4.4.5.
func times(ack *dhcpv4.DHCPv4) (renew, rebind, expires time.Duration) {
	expires = ack.IPAddressLeaseTime(time.Hour)
	if expires >= forever {
		return 0, 0, 0
	}
	expires = max(expires, minLifetime)
	usual := expires - expires/8 // seven times as long may be more than a Duration holds
	rebind = ack.IPAddressRebindingTime(usual)
	if rebind <= 0 || rebind > expires {
		rebind = usual
	}
	renew = ack.IPAddressRenewalTime(expires / 2)
	if renew <= 0 || renew > rebind {
		renew = min(expires/2, rebind)
	}
	return renew, rebind, expires
}

// address is an IPv4 address that a machine can have.
func address(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip.To4())
	ok = ok && !a.IsUnspecified() && !a.IsMulticast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
	if !ok {
		return netip.Addr{}, false
	}
	return a, true
}

// domains are those names that can stand in resolv.conf without being something else there.
func domains(names []string) []string {
	var list []string
	for _, name := range names {
		bad := func(r rune) bool {
			return !(r == '-' || r == '_' || r == '.' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z')
		}
		if name != "" && name[0] != '-' && len(name) <= 253 && !strings.ContainsFunc(name, bad) {
			list = append(list, name)
		}
	}
	return list
}
