package dhcp

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

const (
	offerTime   = 30 * time.Second // for which an offer is kept
	declineTime = 10 * time.Minute // for which an address that somebody else seems to have is not given out
)

// Answer is what is to be sent, from the gateway's port 67.
type Answer struct {
	Message []byte         // of UDP
	To      netip.AddrPort // 255.255.255.255 if the machine has no address yet
	MAC     MAC            // the machine's: who writes Ethernet frames may send to it what is to the broadcast address
}

// machine returns whose message b is, if it is of a client on Ethernet that is not behind a relay.
func machine(b []byte) (MAC, bool) {
	const chaddr, giaddr = 28, 24
	if len(b) < chaddr+16 || b[0] != byte(dhcpv4.OpcodeBootRequest) || b[1] != byte(iana.HWTypeEthernet) || b[2] != 6 {
		return MAC{}, false
	}
	mac := MAC(b[chaddr:][:6])
	relayed := [4]byte(b[giaddr:][:4]) != [4]byte{}
	return mac, !relayed && mac != MAC{} && mac[0]&1 == 0
}

// Answer takes a message from behind a port of the switch (see Config.PerPort) and returns the answer, if there is one.
func (s *Server) Answer(b []byte, port int) (Answer, bool) {
	mac, ok := machine(b)
	if !ok {
		return Answer{}, false
	}
	m, err := dhcpv4.FromBytes(b)
	if err != nil {
		s.cfg.Log.Debug("DHCP message is malformed", "mac", net.HardwareAddr(mac[:]), "err", err)
		return Answer{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	q := question{Server: s, m: m, mac: mac, port: port, now: s.now()}
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return q.discover()
	case dhcpv4.MessageTypeRequest:
		return q.request()
	case dhcpv4.MessageTypeInform:
		return q.inform()
	case dhcpv4.MessageTypeRelease:
		q.release()
	case dhcpv4.MessageTypeDecline:
		q.decline()
	}
	return Answer{}, false
}

// question is a message that is being answered, with the server's table locked.
type question struct {
	*Server
	m    *dhcpv4.DHCPv4
	mac  MAC
	port int
	now  time.Time
}

// discover offers an address: the machine's own, what it has had, what it would like, or any.
func (q *question) discover() (Answer, bool) {
	a, ok := q.suitable()
	if !ok {
		q.cfg.Log.Warn("no address for machine", "mac", net.HardwareAddr(q.mac[:]), "port", q.port, "subnet", q.cfg.Subnet)
		return Answer{}, false
	}
	if r := q.table.records[a]; r == nil || r.mac != q.mac || r.state != leased || !r.held(q.now) {
		q.table.set(a, &record{mac: q.mac, port: q.port, state: offered, until: q.now.Add(offerTime), name: q.name()})
	}
	return q.reply(dhcpv4.MessageTypeOffer, a), true
}

func (q *question) suitable() (netip.Addr, bool) {
	if a, ok := q.static[q.mac]; ok {
		return a, true
	}
	if a, ok := q.table.byMAC[q.mac]; ok {
		return a, true
	}
	if !q.table.admit(q.port, q.cfg.PerPort, q.now) {
		return netip.Addr{}, false
	}
	if a := addr(q.m.RequestedIPAddress()); q.table.free(a, q.mac, q.now) {
		return a, true
	}
	return q.table.choose(q.now)
}

// request is RFC 2131, 4.3.2. The address is in an option when an offer was taken (then the server is too) and after a reboot,
// and in the header when a lease is renewed.
func (q *question) request() (Answer, bool) {
	a := addr(q.m.RequestedIPAddress())
	if server := addr(q.m.ServerIdentifier()); server.IsValid() && server != q.cfg.Gateway {
		if own, ok := q.table.byMAC[q.mac]; ok && q.table.records[own].state == offered {
			q.table.set(own, nil) // it has chosen another server
		}
		return Answer{}, false
	}
	if !a.IsValid() {
		a = addr(q.m.ClientIPAddr)
	}
	if !q.mayHave(a) {
		r := q.table.records[a]
		if r != nil && r.mac != q.mac && r.held(q.now) {
			q.cfg.Log.Warn("machine asks for the address of another one", "mac", net.HardwareAddr(q.mac[:]), "addr", a, "owner", net.HardwareAddr(r.mac[:]))
		}
		return q.nak(), true
	}
	_, static := q.static[q.mac]
	if !static && q.table.byMAC[q.mac] != a && !q.table.admit(q.port, q.cfg.PerPort, q.now) {
		return q.nak(), true
	}
	q.table.set(a, &record{mac: q.mac, port: q.port, state: leased, until: q.now.Add(q.cfg.Lease), name: q.name()})
	return q.reply(dhcpv4.MessageTypeAck, a), true
}

// mayHave tells whether the machine may have a: its own address, if it has one of its own, or what is free.
func (q *question) mayHave(a netip.Addr) bool {
	if own, ok := q.static[q.mac]; ok {
		return a == own
	}
	return a.IsValid() && q.table.free(a, q.mac, q.now)
}

func (q *question) inform() (Answer, bool) {
	if a := addr(q.m.ClientIPAddr); !q.cfg.Subnet.Contains(a) {
		return Answer{}, false
	}
	return q.reply(dhcpv4.MessageTypeAck, netip.Addr{}), true
}

func (q *question) release() {
	a := addr(q.m.ClientIPAddr)
	if r := q.table.records[a]; r != nil && r.mac == q.mac && r.state == leased {
		r.state, r.until = given, q.now
	}
}

func (q *question) decline() {
	a := addr(q.m.RequestedIPAddress())
	if r := q.table.records[a]; r == nil || r.mac != q.mac || r.state == declined {
		return
	}
	q.cfg.Log.Warn("machine has found its address in use", "mac", net.HardwareAddr(q.mac[:]), "addr", a)
	q.table.set(a, &record{mac: q.mac, port: q.port, state: declined, until: q.now.Add(declineTime)})
}

// reply makes an answer that gives a; if a is not valid, one that gives no address but the rest.
func (q *question) reply(typ dhcpv4.MessageType, a netip.Addr) Answer {
	r := q.bare(typ)
	if a.IsValid() {
		r.YourIPAddr = a.AsSlice()
		r.UpdateOption(dhcpv4.OptIPAddressLeaseTime(q.cfg.Lease))
	}
	r.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(q.cfg.Subnet.Bits(), 32)))
	r.UpdateOption(dhcpv4.OptRouter(q.cfg.Gateway.AsSlice()))
	dns := make([]net.IP, len(q.cfg.DNS))
	for i, d := range q.cfg.DNS {
		dns[i] = d.AsSlice()
	}
	r.UpdateOption(dhcpv4.OptDNS(dns...))
	if q.cfg.MTU > 0 {
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, dhcpv4.Uint16(q.cfg.MTU).ToBytes()))
	}
	if q.cfg.Domain != "" {
		r.UpdateOption(dhcpv4.OptDomainName(q.cfg.Domain))
	}
	q.addSearch(r)
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), dhcpv4.ClientPort)
	if c := addr(q.m.ClientIPAddr); typ == dhcpv4.MessageTypeAck && q.cfg.Subnet.Contains(c) {
		to = netip.AddrPortFrom(c, dhcpv4.ClientPort)
		r.ClientIPAddr = c.AsSlice()
	}
	return Answer{Message: r.ToBytes(), To: to, MAC: q.mac}
}

// maxMessage is the length of a DHCP message that every client takes, without the headers of IP and UDP (RFC 2131, 2).
const maxMessage = 576 - 28

// addSearch adds as many domains as fit in what the client takes. Those who do not, cannot have the others, either.
func (q *question) addSearch(r *dhcpv4.DHCPv4) {
	limit := maxMessage
	if n, err := q.m.MaxMessageSize(); err == nil {
		limit = min(max(limit, int(n)-28), max(limit, q.cfg.MTU-28))
	}
	for domains := q.cfg.Search; len(domains) > 0; domains = domains[:len(domains)-1] {
		dhcpv4.WithDomainSearchList(domains...)(r)
		if len(r.ToBytes()) <= limit {
			return
		}
		r.DeleteOption(dhcpv4.OptionDNSDomainSearchList)
	}
}

// nak says no, to everybody: the machine may believe that it has an address that is not of this subnet.
func (q *question) nak() Answer {
	r := q.bare(dhcpv4.MessageTypeNak)
	r.SetBroadcast()
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), dhcpv4.ClientPort)
	return Answer{Message: r.ToBytes(), To: to, MAC: q.mac}
}

// bare is an answer with what every answer has.
func (q *question) bare(typ dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	r := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootReply, HWType: q.m.HWType, TransactionID: q.m.TransactionID,
		Flags: q.m.Flags, ClientHWAddr: q.m.ClientHWAddr, Options: make(dhcpv4.Options),
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: net.IPv4zero,
	}
	r.UpdateOption(dhcpv4.OptMessageType(typ))
	r.UpdateOption(dhcpv4.OptServerIdentifier(q.cfg.Gateway.AsSlice()))
	if id := q.m.GetOneOption(dhcpv4.OptionClientIdentifier); len(id) > 0 { // RFC 6842
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, id))
	}
	return r
}

// name is what the machine calls itself, if that is a name of DNS.
func (q *question) name() string {
	name, _, _ := strings.Cut(strings.ToLower(q.m.HostName()), ".")
	valid := func(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' }
	if len(name) > 63 || strings.Trim(name, "-") != name || slices.ContainsFunc([]byte(name), func(c byte) bool { return !valid(c) }) {
		return ""
	}
	return name
}

// addr is not valid if ip is none, or no host's.
func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	if a = a.Unmap(); !a.Is4() || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}
