package firewall

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
)

func TestForwardRules(t *testing.T) {
	f := func(proto usernet.Proto, hostIP string, port uint16, target string) Forward {
		f := Forward{Proto: proto, HostPort: port, Target: netip.MustParseAddrPort(target)}
		if hostIP != "" {
			f.HostIP = netip.MustParseAddr(hostIP)
		}
		return f
	}
	tests := []struct {
		name string
		in   []Forward
		want []string
		v6   bool
	}{
		{"one port", []Forward{f("tcp", "", 80, "10.0.0.2:80")},
			[]string{"! -i una -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2:80"}, false},
		{"host address", []Forward{f("udp", "192.0.2.1", 53, "10.0.0.2:5353")},
			[]string{"-d 192.0.2.1/32 ! -i una -p udp -m udp --dport 53 -j DNAT --to-destination 10.0.0.2:5353"}, false},
		{"all zeroes", []Forward{f("udp", "0.0.0.0", 53, "10.0.0.2:53")},
			[]string{"! -i una -p udp -m udp --dport 53 -j DNAT --to-destination 10.0.0.2:53"}, false},
		{"IPv6", []Forward{f("tcp", "2001:db8::1", 80, "[fd00::2]:8080"), f("tcp", "", 80, "10.0.0.2:80")},
			[]string{"-d 2001:db8::1/128 ! -i una -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd00::2]:8080"}, true},
		{"IPv6 range", []Forward{f("tcp", "", 80, "[fd00::2]:80"), f("tcp", "", 81, "[fd00::2]:81")},
			[]string{"! -i una -p tcp -m tcp --dport 80:81 -j DNAT --to-destination fd00::2"}, true},
		{"left to the relay", []Forward{
			f("tcp", "127.0.0.1", 80, "10.0.0.2:80"), f("tcp", "127.8.8.8", 80, "10.0.0.2:80"), f("tcp", "::1", 80, "10.0.0.2:80"),
			f("tcp", "2001:db8::1", 80, "10.0.0.2:80"), f("tcp", "::", 80, "10.0.0.2:80")}, nil, false},
		{"left to the relay, IPv6", []Forward{f("tcp", "fe80::1%eth0", 80, "[fd00::2]:80"), f("tcp", "::1", 80, "[fd00::2]:80")}, nil, true},
		{"range, unsorted", []Forward{f("tcp", "", 82, "10.0.0.2:82"), f("tcp", "", 80, "10.0.0.2:80"), f("tcp", "", 81, "10.0.0.2:81")},
			[]string{"! -i una -p tcp -m tcp --dport 80:82 -j DNAT --to-destination 10.0.0.2"}, false},
		{"range with a hole", []Forward{f("tcp", "", 80, "10.0.0.2:80"), f("tcp", "", 82, "10.0.0.2:82")},
			[]string{"! -i una -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2:80",
				"! -i una -p tcp -m tcp --dport 82 -j DNAT --to-destination 10.0.0.2:82"}, false},
		{"no range across targets, protocols, addresses", []Forward{
			f("tcp", "", 80, "10.0.0.2:80"), f("tcp", "", 81, "10.0.0.3:81"), f("udp", "", 82, "10.0.0.3:82"), f("udp", "192.0.2.1", 83, "10.0.0.3:83")},
			[]string{"! -i una -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2:80",
				"! -i una -p tcp -m tcp --dport 81 -j DNAT --to-destination 10.0.0.3:81",
				"! -i una -p udp -m udp --dport 82 -j DNAT --to-destination 10.0.0.3:82",
				"-d 192.0.2.1/32 ! -i una -p udp -m udp --dport 83 -j DNAT --to-destination 10.0.0.3:83"}, false},
		{"shifted", []Forward{f("tcp", "", 8080, "10.0.0.2:80"), f("tcp", "", 8081, "10.0.0.2:81")},
			[]string{"! -i una -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.0.2:80",
				"! -i una -p tcp -m tcp --dport 8081 -j DNAT --to-destination 10.0.0.2:81"}, false},
		{"the last port", []Forward{f("tcp", "", 65534, "10.0.0.2:65534"), f("tcp", "", 65535, "10.0.0.2:65535")},
			[]string{"! -i una -p tcp -m tcp --dport 65534:65535 -j DNAT --to-destination 10.0.0.2"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, Network{Bridge: "una", Forwards: tt.in}.forwardRules(tt.v6)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestDiff(t *testing.T) {
	had := newRuleset(false)
	had.add(dnat, "-p tcp --dport 1 -j DNAT --to-destination 10.0.0.2:1")
	had.add(dnat, "-p tcp --dport 2 -j DNAT --to-destination 10.0.0.2:2")
	want := newRuleset(false)
	want.add(dnat, "-p tcp --dport 2 -j DNAT --to-destination 10.0.0.2:2")
	want.add(dnat, "-p tcp --dport 1 -j DNAT --to-destination 10.0.0.3:1")
	tests := []struct {
		name       string
		have, want ruleset
		script     string
	}{
		{"same", want, want, ""},
		{"nothing", ruleset{}, ruleset{}, ""},
		// Deleted before added: a port is never in two rules.
		{"a port moves", had, want, `*nat
-D USERNET-DNAT -p tcp --dport 1 -j DNAT --to-destination 10.0.0.2:1
-A USERNET-DNAT -p tcp --dport 1 -j DNAT --to-destination 10.0.0.3:1
COMMIT
`},
		{"everything goes", newRuleset(true), ruleset{}, `*mangle
-D FORWARD -j USERNET-ISOLATE
-F USERNET-ISOLATE
-X USERNET-ISOLATE
COMMIT
*nat
-D PREROUTING ! -s fe80::/10 -m addrtype --dst-type LOCAL -j USERNET-DNAT
-D OUTPUT ! -s fe80::/10 ! -d ::1/128 -m addrtype --dst-type LOCAL -j USERNET-DNAT
-D POSTROUTING -j USERNET-POSTROUTING
-F USERNET-DNAT
-F USERNET-POSTROUTING
-X USERNET-DNAT
-X USERNET-POSTROUTING
COMMIT
*filter
-D FORWARD -j USERNET-FORWARD
-D INPUT -j USERNET-INPUT
-F USERNET-FORWARD
-F USERNET-INPUT
-X USERNET-FORWARD
-X USERNET-INPUT
COMMIT
`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.script, diff(tt.have, tt.want)); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}
