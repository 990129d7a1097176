package dhcp

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var (
	subnet    = netip.MustParsePrefix("192.168.127.0/24")
	gateway   = ip(1)
	firstVM   = MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	hostAlias = ip(254)
)

func ip(n byte) netip.Addr { return netip.AddrFrom4([4]byte{192, 168, 127, n}) }

func mac(i int) MAC { return MAC{2, 0, 0, 0, byte(i >> 8), byte(i)} }

// gvproxys is the configuration that gvproxy has by default.
func gvproxys() Config {
	return Config{
		Subnet: subnet, Gateway: gateway, MTU: 1500,
		Static: map[netip.Addr]MAC{ip(2): firstVM}, Reserved: []netip.Addr{hostAlias},
	}
}

// bed is a server whose clock is the test's.
type bed struct {
	*Server
	t     *testing.T
	clock time.Time
	port  int
}

func newBed(t *testing.T, cfg Config) *bed {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{Server: s, t: t, clock: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	s.now = func() time.Time { return b.clock }
	return b
}

// ask sends a message of mac's and returns the answer, nil if there is none.
func (b *bed) ask(mac MAC, typ dhcpv4.MessageType, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	b.t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(mac[:]), dhcpv4.WithMessageType(typ)}, mods...)...)
	if err != nil {
		b.t.Fatal(err)
	}
	a, ok := b.Answer(m.ToBytes(), b.port)
	if !ok {
		return nil
	}
	r, err := dhcpv4.FromBytes(a.Message)
	if err != nil {
		b.t.Fatal(err)
	}
	if r.TransactionID != m.TransactionID || !bytes.Equal(r.ClientHWAddr, mac[:]) || r.OpCode != dhcpv4.OpcodeBootReply || a.MAC != mac {
		b.t.Errorf("the answer is not to the question: %v", r)
	}
	if addr(r.ServerIdentifier()) != gateway {
		b.t.Errorf("server %v", r.ServerIdentifier())
	}
	return r
}

func requested(a netip.Addr) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(a.AsSlice()))
}

func server(a netip.Addr) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(a.AsSlice()))
}

func ciaddr(a netip.Addr) dhcpv4.Modifier { return dhcpv4.WithClientIP(a.AsSlice()) }

// offer asks for an address and returns what is offered, not valid if nothing is.
func (b *bed) offer(mac MAC, mods ...dhcpv4.Modifier) netip.Addr {
	b.t.Helper()
	r := b.ask(mac, dhcpv4.MessageTypeDiscover, mods...)
	if r == nil {
		return netip.Addr{}
	}
	if r.MessageType() != dhcpv4.MessageTypeOffer {
		b.t.Errorf("a %v for an offer", r.MessageType())
	}
	return addr(r.YourIPAddr)
}

// take takes an address through offer and request.
func (b *bed) take(mac MAC, mods ...dhcpv4.Modifier) netip.Addr {
	b.t.Helper()
	a := b.offer(mac, mods...)
	if !a.IsValid() {
		return a
	}
	b.acked(a, b.ask(mac, dhcpv4.MessageTypeRequest, append(mods, requested(a), server(gateway))...))
	return a
}

func (b *bed) acked(want netip.Addr, r *dhcpv4.DHCPv4) {
	b.t.Helper()
	if r == nil || r.MessageType() != dhcpv4.MessageTypeAck || addr(r.YourIPAddr) != want {
		b.t.Errorf("got %v, want an acknowledgement for %s", r, want)
	}
}

func (b *bed) refused(r *dhcpv4.DHCPv4) {
	b.t.Helper()
	if r == nil || r.MessageType() != dhcpv4.MessageTypeNak || addr(r.YourIPAddr).IsValid() || !r.IsBroadcast() {
		b.t.Errorf("got %v, want a refusal", r)
	}
}

func (b *bed) silent(r *dhcpv4.DHCPv4) {
	b.t.Helper()
	if r != nil {
		b.t.Errorf("got %v, want no answer", r)
	}
}

// TestOptions looks at everything that a machine is told.
func TestOptions(t *testing.T) {
	cfg := gvproxys()
	cfg.Search, cfg.Domain, cfg.Lease = []string{"example.com", "corp.example.com"}, "vm.internal", 2*time.Hour
	cfg.DNS = []netip.Addr{gateway, ip(254)}
	b := newBed(t, cfg)
	id := dhcpv4.WithOption(dhcpv4.OptClientIdentifier([]byte{1, 2, 3}))
	for _, typ := range []dhcpv4.MessageType{dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeInform} {
		mods := []dhcpv4.Modifier{id}
		if typ == dhcpv4.MessageTypeRequest {
			mods = append(mods, requested(ip(2)), server(gateway))
		}
		if typ == dhcpv4.MessageTypeInform {
			mods = append(mods, ciaddr(ip(2)))
		}
		r := b.ask(firstVM, typ, mods...)
		if r == nil {
			t.Fatalf("no answer to %v", typ)
		}
		if ones, _ := r.SubnetMask().Size(); ones != 24 {
			t.Errorf("mask %v", r.SubnetMask())
		}
		if got := fmt.Sprint(r.Router(), r.DNS(), r.DomainSearch(), r.DomainName()); got != "[192.168.127.1] [192.168.127.1 192.168.127.254] [example.com corp.example.com]vm.internal" {
			t.Errorf("%v: told %s", typ, got)
		}
		if mtu := r.Options.Get(dhcpv4.OptionInterfaceMTU); !bytes.Equal(mtu, []byte{5, 220}) {
			t.Errorf("MTU %v", mtu)
		}
		if !bytes.Equal(r.GetOneOption(dhcpv4.OptionClientIdentifier), []byte{1, 2, 3}) {
			t.Error("client identifier is not sent back")
		}
		lease := r.IPAddressLeaseTime(0)
		if typ == dhcpv4.MessageTypeInform {
			if lease != 0 || addr(r.YourIPAddr).IsValid() {
				t.Errorf("an address for who has one: %v", r)
			}
		} else if lease != 2*time.Hour || addr(r.YourIPAddr) != ip(2) {
			t.Errorf("%v for %v", r.YourIPAddr, lease)
		}
	}
}

// TestSearchFits: a long list is cut so that the message arrives.
func TestSearchFits(t *testing.T) {
	cfg := gvproxys()
	for i := range 60 {
		cfg.Search = append(cfg.Search, fmt.Sprintf("department-%d.of.some.large.example%d.com", i, i))
	}
	b := newBed(t, cfg)
	usual := b.ask(firstVM, dhcpv4.MessageTypeDiscover)
	if n := len(usual.ToBytes()); n > maxMessage || n < maxMessage-100 {
		t.Errorf("message of %d bytes", n)
	}
	larger := b.ask(firstVM, dhcpv4.MessageTypeDiscover, dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(65535)))
	if n := len(larger.ToBytes()); n <= maxMessage || n > 1500-28 {
		t.Errorf("message of %d bytes for who takes more", n)
	}
	if got, want := larger.DomainSearch().Labels, cfg.Search; !slices.Equal(got, want[:len(got)]) {
		t.Errorf("domains %v", got)
	}
}

func TestPool(t *testing.T) {
	b := newBed(t, gvproxys())
	if a := b.take(firstVM); a != ip(2) {
		t.Errorf("the first machine has %s", a)
	}
	got := make(map[netip.Addr]bool)
	for i := range 251 {
		a := b.take(mac(i))
		if !subnet.Contains(a) || slices.Contains([]netip.Addr{ip(0), ip(1), ip(2), ip(254), ip(255)}, a) || got[a] {
			t.Fatalf("machine %d has %s", i, a)
		}
		if got[a] = true; i == 0 && a != ip(3) {
			t.Errorf("the second machine has %s", a)
		}
	}
	if a := b.offer(mac(1000)); a.IsValid() {
		t.Errorf("%s from an empty pool", a)
	}
	// Who is known is served.
	if a := b.offer(mac(7)); a != ip(10) {
		t.Errorf("machine 7 has %s", a)
	}
	if a := b.take(firstVM); a != ip(2) {
		t.Errorf("the first machine has %s", a)
	}
	// What runs out, is for others: the oldest first.
	b.clock = b.clock.Add(30 * time.Minute)
	b.take(mac(0))
	b.clock = b.clock.Add(31 * time.Minute)
	if a := b.take(mac(1000)); a != ip(4) {
		t.Errorf("machine 1000 has %s", a)
	}
	if n := len(b.Leases()); n != 3 { // the static one, of 0, of 1000
		t.Errorf("%d leases: %v", n, b.Leases())
	}
	if a := b.take(mac(1)); a == ip(4) || !a.IsValid() {
		t.Errorf("who has lost its address has %s", a)
	}
}

func TestRequest(t *testing.T) {
	request := dhcpv4.MessageTypeRequest
	b := newBed(t, gvproxys())
	one, two, three := mac(1), mac(2), mac(3)

	// What it would like, if that is free.
	if a := b.take(one, requested(ip(77))); a != ip(77) {
		t.Errorf("has %s", a)
	}
	for _, no := range []netip.Addr{ip(77), ip(1), ip(2), ip(254), ip(255), ip(0), netip.MustParseAddr("10.0.0.9")} {
		if a := b.offer(two, requested(no)); a == no || !a.IsValid() {
			t.Errorf("is offered %s", a)
		}
		b.refused(b.ask(two, request, requested(no)))
		b.refused(b.ask(two, request, ciaddr(no)))
	}
	b.refused(b.ask(two, request)) // for nothing

	// After a reboot of its own, and of ours.
	b.acked(ip(77), b.ask(one, request, requested(ip(77))))
	b.acked(ip(88), b.ask(three, request, requested(ip(88))))
	b.acked(ip(88), b.ask(three, request, ciaddr(ip(88))))
	if a := b.offer(three); a != ip(88) {
		t.Errorf("is offered %s", a)
	}

	// Renewal goes to where the address is.
	m, _ := dhcpv4.New(dhcpv4.WithHwAddr(one[:]), dhcpv4.WithMessageType(request), ciaddr(ip(77)))
	b.clock = b.clock.Add(59 * time.Minute)
	if a, ok := b.Answer(m.ToBytes(), 0); !ok || a.To != netip.MustParseAddrPort("192.168.127.77:68") {
		t.Errorf("answers to %s", a.To)
	}
	b.clock = b.clock.Add(59 * time.Minute)
	if l := b.Leases(); len(l) != 2 || l[1].Addr != ip(77) {
		t.Errorf("leases %v", l)
	}

	// A machine that takes another address leaves its own.
	b.acked(ip(90), b.ask(one, request, requested(ip(90))))
	if a := b.take(two, requested(ip(77))); a == ip(77) {
		t.Log("the address that was left is free") // or its own from before, which comes first
	}
	for _, l := range b.Leases() {
		if l.Addr == ip(77) && l.MAC == one {
			t.Errorf("a machine has two addresses: %v", b.Leases())
		}
	}

	// Who has chosen another server is not answered, and its offer is free.
	four := mac(4)
	a := b.offer(four)
	b.silent(b.ask(four, request, requested(a), server(ip(200))))
	if r := b.table.records[a]; r != nil {
		t.Errorf("%s is kept: %+v", a, r)
	}
	// A static machine has its address only, and has it from whom has asked for it.
	b.refused(b.ask(firstVM, request, requested(ip(50))))
	b.acked(ip(2), b.ask(firstVM, request, requested(ip(2))))
}

func TestOfferRunsOut(t *testing.T) {
	cfg := gvproxys()
	cfg.Subnet = netip.MustParsePrefix("192.168.127.0/29") // 3 to 6
	cfg.Reserved = nil
	b := newBed(t, cfg)
	for i := range 4 {
		b.offer(mac(i))
	}
	if a := b.offer(mac(9)); a.IsValid() {
		t.Errorf("is offered %s", a)
	}
	b.clock = b.clock.Add(offerTime + 1)
	if a := b.take(mac(9)); a != ip(3) {
		t.Errorf("has %s", a)
	}
	b.refused(b.ask(mac(0), dhcpv4.MessageTypeRequest, requested(ip(3)), server(gateway)))
	b.acked(ip(4), b.ask(mac(1), dhcpv4.MessageTypeRequest, requested(ip(4)), server(gateway)))
}

func TestReleaseAndDecline(t *testing.T) {
	b := newBed(t, gvproxys())
	one, two := mac(1), mac(2)
	a := b.take(one)
	b.silent(b.ask(two, dhcpv4.MessageTypeRelease, ciaddr(a))) // not its own
	b.silent(b.ask(two, dhcpv4.MessageTypeDecline, requested(a)))
	if l := b.Leases(); len(l) != 2 || l[1].MAC != one {
		t.Errorf("leases %v", l)
	}
	b.silent(b.ask(one, dhcpv4.MessageTypeRelease, ciaddr(a)))
	if l := b.Leases(); len(l) != 1 {
		t.Errorf("leases %v", l)
	}
	if got := b.offer(one); got != a {
		t.Errorf("gets %s where it had %s", got, a)
	}
	b.take(one)
	b.silent(b.ask(one, dhcpv4.MessageTypeRelease, ciaddr(a)))
	if got := b.take(two, requested(a)); got != a {
		t.Errorf("gets %s; %s is free", got, a)
	}
	b.silent(b.ask(two, dhcpv4.MessageTypeDecline, requested(a)))
	if got := b.take(two, requested(a)); got == a {
		t.Errorf("gets %s, which is in use", got)
	}
	b.refused(b.ask(one, dhcpv4.MessageTypeRequest, requested(a)))
	b.clock = b.clock.Add(declineTime + 1)
	b.acked(a, b.ask(one, dhcpv4.MessageTypeRequest, requested(a)))
}

// TestDeclineAll: a machine that declines everything does not use up the pool.
func TestDeclineAll(t *testing.T) {
	b := newBed(t, gvproxys())
	for range 1000 {
		if a := b.take(mac(1)); a.IsValid() {
			b.ask(mac(1), dhcpv4.MessageTypeDecline, requested(a))
		}
	}
	if a := b.take(mac(2)); !a.IsValid() {
		t.Error("there is nothing left for others")
	}
}

// TestPerPort has one port take all that it gets.
func TestPerPort(t *testing.T) {
	cfg := gvproxys()
	cfg.PerPort = 4
	b := newBed(t, cfg)
	b.port = 7
	for i := range 1000 {
		b.offer(mac(i)) // offers push each other out
	}
	if n := len(b.table.records); n != 4 {
		t.Errorf("%d records of one port", n)
	}
	for i := range 10 {
		if a := b.take(mac(2000 + i)); a.IsValid() != (i < 4) {
			t.Errorf("machine %d has %s", i, a)
		}
	}
	b.refused(b.ask(mac(3000), dhcpv4.MessageTypeRequest, requested(ip(99))))
	b.ask(mac(2000), dhcpv4.MessageTypeRelease, ciaddr(b.table.byMAC[mac(2000)]))
	if a := b.take(mac(3000)); !a.IsValid() {
		t.Error("nothing after a release")
	}
	if a := b.take(firstVM); a != ip(2) {
		t.Errorf("a static machine has %s", a)
	}
	b.port = 8
	if a := b.take(mac(1)); !a.IsValid() {
		t.Error("nothing for another port")
	}
	b.port = 0
	if n := len(b.table.ports); n != 2 {
		t.Errorf("ports %v", b.table.ports)
	}
}

// TestLargeSubnet: the table is bounded by itself.
func TestLargeSubnet(t *testing.T) {
	cfg := gvproxys()
	cfg.Subnet = netip.MustParsePrefix("192.0.0.0/8")
	b := newBed(t, cfg)
	for i := range maxRecords + 100 {
		b.offer(MAC{2, 0, 0, 1, byte(i >> 8), byte(i)})
	}
	if n := len(b.table.records); n != maxRecords {
		t.Errorf("%d records", n)
	}
}

func TestNames(t *testing.T) {
	b := newBed(t, gvproxys())
	for i, tt := range []struct{ sent, want string }{
		{"web", "web"}, {"WEB-1", "web-1"}, {"web.example.com", "web"}, {"", ""}, {"-a", ""}, {"a_b", ""}, {"ä", ""},
		{strings.Repeat("a", 64), ""}, {"a\x00b", ""}, {".", ""},
	} {
		a := b.take(mac(i), dhcpv4.WithOption(dhcpv4.OptHostName(tt.sent)))
		for _, l := range b.Leases() {
			if l.Addr == a && l.Name != tt.want {
				t.Errorf("%q is called %q, want %q", tt.sent, l.Name, tt.want)
			}
		}
	}
}

// TestNotForUs: what is no question of a machine's on this network.
func TestNotForUs(t *testing.T) {
	b := newBed(t, gvproxys())
	good, _ := dhcpv4.NewDiscovery(net.HardwareAddr(firstVM[:]))
	for _, tt := range []struct {
		name   string
		change func(m *dhcpv4.DHCPv4)
	}{
		{"an answer", func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootReply }},
		{"not Ethernet", func(m *dhcpv4.DHCPv4) { m.HWType = 32 }},
		{"a longer address", func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = append(m.ClientHWAddr, 1) }},
		{"a group's address", func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = net.HardwareAddr{1, 0, 0, 0, 0, 1} }},
		{"no address", func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = make(net.HardwareAddr, 6) }},
		{"by a relay", func(m *dhcpv4.DHCPv4) { m.GatewayIPAddr = net.IPv4(192, 168, 127, 9) }},
		{"BOOTP", func(m *dhcpv4.DHCPv4) { m.DeleteOption(dhcpv4.OptionDHCPMessageType) }},
		{"an offer", func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeOffer)) }},
		{"INFORM from elsewhere", func(m *dhcpv4.DHCPv4) {
			m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeInform))
			m.ClientIPAddr = net.IPv4(10, 0, 0, 1)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := dhcpv4.FromBytes(good.ToBytes())
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := b.Answer(m.ToBytes(), 0); !ok {
				t.Fatal("the good one is not answered")
			}
			tt.change(m)
			if a, ok := b.Answer(m.ToBytes(), 0); ok {
				t.Errorf("answers %x", a.Message)
			}
		})
	}
}

func TestNew(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(c *Config)
	}{
		{"IPv6", func(c *Config) { c.Subnet = netip.MustParsePrefix("fd00::/64") }},
		{"too small", func(c *Config) { c.Subnet = netip.MustParsePrefix("192.168.127.0/31") }},
		{"no subnet", func(c *Config) { c.Subnet = netip.Prefix{} }},
		{"gateway elsewhere", func(c *Config) { c.Gateway = netip.MustParseAddr("10.0.0.1") }},
		{"static lease elsewhere", func(c *Config) { c.Static[netip.MustParseAddr("10.0.0.1")] = mac(1) }},
		{"static lease of the gateway's", func(c *Config) { c.Static[gateway] = mac(1) }},
		{"static lease of the broadcast address", func(c *Config) { c.Static[ip(255)] = mac(1) }},
		{"a machine with two", func(c *Config) { c.Static[ip(9)] = firstVM }},
		{"too many servers", func(c *Config) { c.DNS = slices.Repeat([]netip.Addr{gateway}, 17) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := gvproxys()
			tt.change(&cfg)
			if _, err := New(cfg); err == nil {
				t.Error("it is taken")
			}
		})
	}
	for p, want := range map[string]string{"10.1.2.0/24": "10.1.2.255", "10.0.0.0/8": "10.255.255.255", "10.1.2.4/30": "10.1.2.7", "10.1.128.0/17": "10.1.255.255"} {
		if got := last(netip.MustParsePrefix(p)); got.String() != want {
			t.Errorf("last of %s: %s, want %s", p, got, want)
		}
	}
}

// FuzzAnswer sends what guests send, one after the other to the same server.
func FuzzAnswer(f *testing.F) {
	for _, typ := range []dhcpv4.MessageType{1, 3, 4, 7, 8} {
		m, _ := dhcpv4.New(dhcpv4.WithHwAddr(firstVM[:]), dhcpv4.WithMessageType(typ), requested(ip(5)), server(gateway), ciaddr(ip(5)),
			dhcpv4.WithOption(dhcpv4.OptHostName("web")), dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1000)))
		f.Add(m.ToBytes(), []byte{2, 0, 0, 0, 0, 1}, uint8(1))
	}
	cfg := gvproxys()
	cfg.Search = []string{"example.com"}
	f.Fuzz(func(t *testing.T, b, client []byte, port uint8) {
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			a, ok := s.Answer(b, int(port))
			if ok && (len(a.Message) < 240 || !a.To.IsValid()) {
				t.Errorf("answer %x to %s", a.Message, a.To)
			}
			if len(b) > 34 {
				copy(b[28:34], client)
			}
		}
		seen := make(map[MAC]bool)
		for _, l := range s.Leases() {
			if seen[l.MAC] || !subnet.Contains(l.Addr) || l.Addr == gateway || l.Addr == hostAlias || l.Addr == ip(255) || l.Addr == ip(0) {
				t.Errorf("leases %v", s.Leases())
			}
			seen[l.MAC] = true
		}
	})
}
