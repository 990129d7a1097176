package firewall

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
)

// sample has one of everything.
func sample() State {
	to := func(proto usernet.Proto, hostIP string, port uint16, target string) Forward {
		f := Forward{Proto: proto, HostPort: port, Target: netip.MustParseAddrPort(target)}
		if hostIP != "" {
			f.HostIP = netip.MustParseAddr(hostIP)
		}
		return f
	}
	return State{
		Networks: []Network{
			{Bridge: "una", Subnets: subnetsA, Masquerade: true, Resolver: addrs("10.200.1.1", "fd00:1::1"), Forwards: []Forward{
				to("tcp", "", 8080, "10.200.1.2:80"),
				to("tcp", "", 8080, "[fd00:1::2]:80"),
				to("udp", "192.0.2.1", 53, "10.200.1.2:53"),
				to("sctp", "", 5000, "10.200.1.3:5000"),
				to("tcp", "", 9001, "10.200.1.2:9001"),
				to("tcp", "", 9000, "10.200.1.2:9000"),
				to("tcp", "", 9002, "10.200.1.2:9002"),
				to("tcp", "127.0.0.1", 80, "10.200.1.2:80"),
			}},
			{Bridge: "unb", Subnets: subnetsB[:1], Masquerade: true, Source4: netip.MustParseAddr("192.0.2.9")},
			{Bridge: "unc", Subnets: prefixes("10.200.3.0/24"), Internal: true, Resolver: addrs("10.200.3.1")},
		},
		Foreign: []string{"docker0", "br-0123456789ab", "una", "odd name"},
	}
}

func addrs(list ...string) []netip.Addr {
	var as []netip.Addr
	for _, a := range list {
		as = append(as, netip.MustParseAddr(a))
	}
	return as
}

const golden4 = `*mangle
-P PREROUTING ACCEPT
-P INPUT ACCEPT
-P FORWARD ACCEPT
-P OUTPUT ACCEPT
-P POSTROUTING ACCEPT
-N USERNET-ISOLATE
-A FORWARD -j USERNET-ISOLATE
-A USERNET-ISOLATE ! -i una -o una -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE -i una -o docker0 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE -i una -o br-0123456789ab -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE ! -i unb -o unb -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE -i unb -o docker0 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE -i unb -o br-0123456789ab -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE -i unc ! -o unc -j DROP
-A USERNET-ISOLATE ! -i unc -o unc -j DROP
*nat
-P PREROUTING ACCEPT
-P INPUT ACCEPT
-P OUTPUT ACCEPT
-P POSTROUTING ACCEPT
-N USERNET-DNAT
-N USERNET-POSTROUTING
-A PREROUTING -m addrtype --dst-type LOCAL -j USERNET-DNAT
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j USERNET-DNAT
-A POSTROUTING -j USERNET-POSTROUTING
-A USERNET-DNAT ! -i una -p sctp -m sctp --dport 5000 -j DNAT --to-destination 10.200.1.3:5000
-A USERNET-DNAT ! -i una -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.200.1.2:80
-A USERNET-DNAT ! -i una -p tcp -m tcp --dport 9000:9002 -j DNAT --to-destination 10.200.1.2
-A USERNET-DNAT -d 192.0.2.1/32 ! -i una -p udp -m udp --dport 53 -j DNAT --to-destination 10.200.1.2:53
-A USERNET-POSTROUTING -s 10.200.1.0/24 ! -o una -j MASQUERADE
-A USERNET-POSTROUTING -s 10.200.2.0/24 ! -o unb -j SNAT --to-source 192.0.2.9
*filter
-P INPUT ACCEPT
-P FORWARD ACCEPT
-P OUTPUT ACCEPT
-N USERNET-FORWARD
-N USERNET-INPUT
-A INPUT -j USERNET-INPUT
-A FORWARD -j USERNET-FORWARD
-A USERNET-FORWARD -i una -j ACCEPT
-A USERNET-FORWARD -o una -j ACCEPT
-A USERNET-FORWARD -i unb -j ACCEPT
-A USERNET-FORWARD -o unb -j ACCEPT
-A USERNET-FORWARD -i unc -o unc -j ACCEPT
-A USERNET-INPUT -d 10.200.1.1/32 -i una -p udp -m udp --dport 53 -j ACCEPT
-A USERNET-INPUT -d 10.200.1.1/32 -i una -p tcp -m tcp --dport 53 -j ACCEPT
-A USERNET-INPUT -d 10.200.3.1/32 -i unc -p udp -m udp --dport 53 -j ACCEPT
-A USERNET-INPUT -d 10.200.3.1/32 -i unc -p tcp -m tcp --dport 53 -j ACCEPT
`

const golden6 = `*mangle
-P PREROUTING ACCEPT
-P INPUT ACCEPT
-P FORWARD ACCEPT
-P OUTPUT ACCEPT
-P POSTROUTING ACCEPT
-N USERNET-ISOLATE
-A FORWARD -j USERNET-ISOLATE
-A USERNET-ISOLATE ! -i una -o una -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE -i una -o docker0 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A USERNET-ISOLATE -i una -o br-0123456789ab -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
*nat
-P PREROUTING ACCEPT
-P INPUT ACCEPT
-P OUTPUT ACCEPT
-P POSTROUTING ACCEPT
-N USERNET-DNAT
-N USERNET-POSTROUTING
-A PREROUTING ! -s fe80::/10 -m addrtype --dst-type LOCAL -j USERNET-DNAT
-A OUTPUT ! -s fe80::/10 ! -d ::1/128 -m addrtype --dst-type LOCAL -j USERNET-DNAT
-A POSTROUTING -j USERNET-POSTROUTING
-A USERNET-DNAT ! -i una -p tcp -m tcp --dport 8080 -j DNAT --to-destination [fd00:1::2]:80
-A USERNET-POSTROUTING -s fd00:1::/64 ! -o una -j MASQUERADE
*filter
-P INPUT ACCEPT
-P FORWARD ACCEPT
-P OUTPUT ACCEPT
-N USERNET-FORWARD
-N USERNET-INPUT
-A INPUT -j USERNET-INPUT
-A FORWARD -j USERNET-FORWARD
-A USERNET-FORWARD -i una -j ACCEPT
-A USERNET-FORWARD -o una -j ACCEPT
-A USERNET-INPUT -d fd00:1::1/128 -i una -p udp -m udp --dport 53 -j ACCEPT
-A USERNET-INPUT -d fd00:1::1/128 -i una -p tcp -m tcp --dport 53 -j ACCEPT
`

// golden fails the test unless the kernel has the sample's rules.
func golden(t *testing.T) {
	t.Helper()
	if d := cmp.Diff(golden4, list(t, "iptables")); d != "" {
		t.Errorf("IPv4 rules (-want +got):\n%s", d)
	}
	if d := cmp.Diff(golden6, list(t, "ip6tables")); d != "" {
		t.Errorf("IPv6 rules (-want +got):\n%s", d)
	}
}

// sameRules is golden without regard for the order of rules inside our chains.
func sameRules(t *testing.T) {
	t.Helper()
	sorted := func(s string) map[string]int {
		lines := map[string]int{}
		for line := range strings.Lines(s) {
			lines[line]++
		}
		return lines
	}
	if d := cmp.Diff(sorted(golden4+golden6), sorted(list(t, "iptables")+list(t, "ip6tables"))); d != "" {
		t.Errorf("rules (-want +got):\n%s", d)
	}
}
