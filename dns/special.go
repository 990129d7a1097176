package dns

import (
	"net/netip"
	"strings"
)

// special answers the names that must not leave the machine, whatever the network.
type special struct{}

var (
	loopback4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)
	loopback  = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	localhost = []string{"localhost."}
)

// Lookup implements Source.
func (special) Lookup(name string) (Answer, bool) {
	switch top := name[strings.LastIndexByte(name[:len(name)-1], '.')+1:]; top {
	case "localhost.": // RFC 6761 section 6.3
		return Answer{Addrs: loopback, Zone: top}, true
	case "invalid.": // RFC 6761 section 6.4
		return Answer{Missing: name != top, Zone: top}, true
	case "arpa.":
		return specialArpa(name)
	}
	return Answer{}, false
}

func specialArpa(name string) (Answer, bool) {
	// RFC 9462 section 6.1: clients must not be told to go past this resolver to the one behind it.
	if zone := "resolver.arpa."; name == zone || strings.HasSuffix(name, "."+zone) {
		return Answer{Zone: zone}, true
	}
	p, exact, ok := parseReverse(name)
	switch {
	case !ok:
		return Answer{}, false
	case exact && (p.Addr() == loopback[0] || p.Addr() == loopback[1]):
		return Answer{Names: localhost}, true
	case p.Addr().Is4() && p.Bits() >= loopback4.Bits() && loopback4.Contains(p.Addr()): // RFC 6303 section 4.2
		return Answer{Missing: p.Bits() == 32, Zone: "127.in-addr.arpa."}, true
	}
	return Answer{}, false
}
