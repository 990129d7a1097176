package dhcp

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
)

var router = Router{
	MAC: MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd}, Addr: netip.MustParseAddr("fe80::1"), Prefix: netip.MustParsePrefix("fd00:1:2:3::/64"),
	MTU: 1500, DNS: []netip.Addr{netip.MustParseAddr("fd00:1:2:3::1")}, Search: []string{"a.bc"}, Lifetime: 20 * time.Minute,
}

// TestAdvertisement holds the bytes against what the RFCs draw.
func TestAdvertisement(t *testing.T) {
	want := strings.Join([]string{
		"333300000001 5a94efe40cdd 86dd",
		"60000000 0068 3a ff fe800000000000000000000000000001 ff020000000000000000000000000001",
		"86 00 CCCC 40 40 04b0 00000000 00000000",
		"01 01 5a94efe40cdd",
		"03 04 40 c0 000004b0 000004b0 00000000 fd000001000200030000000000000000",
		"05 01 0000 000005dc",
		"19 03 0000 000004b0 fd000001000200030000000000000001",
		"1f 02 0000 000004b0 0161026263000000",
	}, "")
	got := router.Advertisement(MAC{}, AllNodes)
	icmp := got[ethernetLen+ipv6Len:]
	if checksum(got[ethernetLen+8:][:32], icmp) != 0 {
		t.Error("wrong checksum")
	}
	text := hex.EncodeToString(got)
	sum := hex.EncodeToString(icmp[2:4])
	if w := strings.ReplaceAll(strings.ReplaceAll(want, " ", ""), "CCCC", sum); text != w {
		t.Errorf("got  %s\nwant %s", text, w)
	}
	one := router.Advertisement(firstVM, netip.MustParseAddr("fe80::2"))
	if !bytes.Equal(one[:6], firstVM[:]) || !bytes.Equal(one[ethernetLen+24:][:16], netip.MustParseAddr("fe80::2").AsSlice()) {
		t.Errorf("got %x", one[:ethernetLen+ipv6Len])
	}
	bare := Router{MAC: router.MAC, Addr: router.Addr, Prefix: router.Prefix}.Advertisement(MAC{}, AllNodes)
	if len(bare) != ethernetLen+ipv6Len+16+8+32 {
		t.Errorf("%d bytes", len(bare))
	}
	long := router
	for range 200 {
		long.Search = append(long.Search, "department.of.some.large.example.com")
	}
	if n := len(long.Advertisement(MAC{}, AllNodes)); n > 3000 || n < 1000 {
		t.Errorf("with a long list %d bytes", n)
	}
}

func inform(typ dhcpv6.MessageType, options ...dhcpv6.Option) []byte {
	m := &dhcpv6.Message{MessageType: typ, TransactionID: dhcpv6.TransactionID{1, 2, 3}}
	for _, o := range options {
		m.AddOption(o)
	}
	return m.ToBytes()
}

func TestStateless(t *testing.T) {
	client := &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: firstVM[:]}
	self := &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: router.MAC[:]}
	for _, tt := range []struct {
		name string
		ask  []byte
		ok   bool
	}{
		{"anonymous", inform(dhcpv6.MessageTypeInformationRequest), true},
		{"with a name", inform(dhcpv6.MessageTypeInformationRequest, dhcpv6.OptClientID(client)), true},
		{"to us", inform(dhcpv6.MessageTypeInformationRequest, dhcpv6.OptServerID(self)), true},
		{"to another server", inform(dhcpv6.MessageTypeInformationRequest, dhcpv6.OptServerID(client)), false},
		{"for an address", inform(dhcpv6.MessageTypeInformationRequest, &dhcpv6.OptIANA{}), false},
		{"for an address, as usual", inform(dhcpv6.MessageTypeSolicit, dhcpv6.OptClientID(client)), false},
		{"by a relay", inform(dhcpv6.MessageTypeRelayForward), false},
		{"nothing", nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, ok := router.Answer(tt.ask)
			if ok != tt.ok {
				t.Fatalf("answers %v, want %v", ok, tt.ok)
			}
			if !ok {
				return
			}
			m, err := dhcpv6.MessageFromBytes(b)
			if err != nil {
				t.Fatal(err)
			}
			dns, search := m.Options.DNS(), m.Options.DomainSearchList()
			if m.Type() != dhcpv6.MessageTypeReply || m.TransactionID != (dhcpv6.TransactionID{1, 2, 3}) || !m.Options.ServerID().Equal(self) ||
				len(dns) != 1 || !dns[0].Equal(net.ParseIP("fd00:1:2:3::1")) || len(search.Labels) != 1 || search.Labels[0] != "a.bc" {
				t.Errorf("answers %v", m)
			}
			if asked, _ := dhcpv6.MessageFromBytes(tt.ask); (asked.Options.ClientID() == nil) != (m.Options.ClientID() == nil) {
				t.Errorf("client %v", m.Options.ClientID())
			}
		})
	}
}

func FuzzStateless(f *testing.F) {
	f.Add(inform(dhcpv6.MessageTypeInformationRequest, dhcpv6.OptClientID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: firstVM[:]})))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := router.Answer(b)
		if !ok {
			return
		}
		if m, err := dhcpv6.MessageFromBytes(a); err != nil || m.Type() != dhcpv6.MessageTypeReply {
			t.Errorf("answers %x: %v", a, err)
		}
	})
}
