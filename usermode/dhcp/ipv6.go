package dhcp

import (
	"encoding/binary"
	"math"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
)

// Router is what the machines of a network are told about IPv6: by router advertisements, from which they make their addresses
// themselves (SLAAC), and by stateless DHCPv6, for those who ask there for DNS servers.
type Router struct {
	MAC    MAC
	Addr   netip.Addr   // link-local: the source of all that it sends
	Prefix netip.Prefix // of 64 bits
	MTU    int          // 0: not told
	DNS    []netip.Addr // IPv6 ones
	Search []string
	// Lifetime of all that is told; 0: half an hour. The router must repeat itself before it ends.
	Lifetime time.Duration
}

var (
	// AllNodes and its MAC are where advertisements go that nobody has asked for (RFC 4861, 2464).
	AllNodes    = netip.MustParseAddr("ff02::1")
	allNodesMAC = MAC{0x33, 0x33, 0, 0, 0, 1}
)

// Options of RFC 4861 and 8106, whose lengths are in units of 8 bytes.
const (
	ndSourceLinkLayer = 1
	ndPrefix          = 3
	ndMTU             = 5
	ndRDNSS           = 25
	ndDNSSL           = 31

	raOtherConfig        = 0x40 // the rest is to be had by DHCPv6
	prefixOnLinkAutoconf = 0xc0

	ethernetLen, ipv6Len  = 14, 40
	etherTypeIPv6         = 0x86dd
	protoICMPv6           = 58
	icmpv6RouterAdvertise = 134
)

func (r Router) lifetime() time.Duration {
	if r.Lifetime == 0 {
		return 30 * time.Minute
	}
	return r.Lifetime
}

// Advertisement is a router advertisement as an Ethernet frame: to a machine that has asked, or to AllNodes, mac being ignored
// then.
func (r Router) Advertisement(mac MAC, to netip.Addr) []byte {
	if to == AllNodes {
		mac = allNodesMAC
	}
	b := append(append(make([]byte, 0, 256), mac[:]...), r.MAC[:]...)
	b = binary.BigEndian.AppendUint16(b, etherTypeIPv6)
	b = append(b, 0x60, 0, 0, 0, 0, 0, protoICMPv6, 255) // a hop limit of 255 proves that it is from this link
	b = append(append(b, r.Addr.AsSlice()...), to.AsSlice()...)
	b = r.appendMessage(b)
	icmp := b[ethernetLen+ipv6Len:]
	binary.BigEndian.PutUint16(b[ethernetLen+4:], uint16(len(icmp)))
	binary.BigEndian.PutUint16(icmp[2:], checksum(b[ethernetLen+8:][:32], icmp))
	return b
}

func (r Router) appendMessage(b []byte) []byte {
	be := binary.BigEndian
	seconds := uint32(min(r.lifetime()/time.Second, math.MaxUint32))
	b = append(b, icmpv6RouterAdvertise, 0, 0, 0, 64, raOtherConfig)
	b = be.AppendUint16(b, uint16(min(seconds, 9000))) // of the router; no more than that, says RFC 4861, 6.2.1
	b = append(b, make([]byte, 8)...)                  // reachable time, retransmission timer: the machine's own
	b = append(append(b, ndSourceLinkLayer, 1), r.MAC[:]...)
	b = append(b, ndPrefix, 4, byte(r.Prefix.Bits()), prefixOnLinkAutoconf)
	b = be.AppendUint32(be.AppendUint32(b, seconds), seconds)
	b = append(append(b, 0, 0, 0, 0), r.Prefix.Masked().Addr().AsSlice()...)
	if r.MTU > 0 {
		b = be.AppendUint32(append(b, ndMTU, 1, 0, 0), uint32(r.MTU))
	}
	if len(r.DNS) > 0 {
		b = be.AppendUint32(append(b, ndRDNSS, byte(1+2*len(r.DNS)), 0, 0), seconds)
		for _, d := range r.DNS {
			b = append(b, d.AsSlice()...)
		}
	}
	for domains := r.Search; len(domains) > 0; domains = domains[:len(domains)-1] {
		labels := (&rfc1035label.Labels{Labels: domains}).ToBytes()
		if n := (len(labels) + 7) / 8; n < 255-1 {
			b = be.AppendUint32(append(b, ndDNSSL, byte(1+n), 0, 0), seconds)
			b = append(append(b, labels...), make([]byte, 8*n-len(labels))...)
			break
		}
	}
	return b
}

// checksum is ICMPv6's, of a message between two addresses, which are given one behind the other.
func checksum(addrs, message []byte) uint16 {
	sum := uint32(len(message)) + protoICMPv6
	for _, b := range [][]byte{addrs, message} {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	sum = sum>>16 + sum&0xffff
	return ^uint16(sum>>16 + sum&0xffff)
}

// Answer answers a message of DHCPv6 that came to port 547, if it is an Information-request (RFC 8415, 18.3.6): addresses are not
// given out here. The answer goes to where the message came from, its port 546.
func (r Router) Answer(b []byte) ([]byte, bool) {
	m, err := dhcpv6.MessageFromBytes(b)
	if err != nil || m.Type() != dhcpv6.MessageTypeInformationRequest {
		return nil, false
	}
	self := &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: r.MAC[:]}
	// Who names another server, or an association that wants addresses, does not mean us (RFC 8415, 16.12).
	if id := m.Options.ServerID(); id != nil && !id.Equal(self) || m.GetOneOption(dhcpv6.OptionIANA) != nil {
		return nil, false
	}
	reply := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply, TransactionID: m.TransactionID}
	if id := m.GetOneOption(dhcpv6.OptionClientID); id != nil {
		reply.AddOption(id)
	}
	reply.AddOption(dhcpv6.OptServerID(self))
	if len(r.DNS) > 0 {
		dns := make([]net.IP, len(r.DNS))
		for i, d := range r.DNS {
			dns[i] = d.AsSlice()
		}
		reply.AddOption(dhcpv6.OptDNS(dns...))
	}
	if len(r.Search) > 0 {
		reply.AddOption(dhcpv6.OptDomainSearchList(&rfc1035label.Labels{Labels: r.Search}))
	}
	reply.AddOption(dhcpv6.OptInformationRefreshTime(max(r.lifetime(), 10*time.Minute))) // no less than that, 21.23
	return reply.ToBytes(), true
}
