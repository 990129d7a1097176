package vmnet

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/usermode/l2"
)

var (
	guestMAC  = l2.MAC{2, 0, 0, 0, 0, 2}
	guest4    = netip.MustParseAddr("192.168.127.2")
	guest6    = netip.MustParseAddr("fd75:6e65:74:7f::2")
	broadcast = l2.MAC{255, 255, 255, 255, 255, 255}
)

// ether is a frame of a guest's.
func ether(dst l2.MAC, etherType uint16, payload []byte) []byte {
	b := append(append(append([]byte(nil), dst[:]...), guestMAC[:]...), byte(etherType>>8), byte(etherType))
	return append(b, payload...)
}

// ipFrame is one with an IP packet in it.
func ipFrame(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	n := ipv6Len
	if src.Is4() {
		n = ipv4Len
	}
	b := ether(gatewayMACOf(), 0, make([]byte, n))
	putIP(b[12:], src, dst, proto, len(payload))
	return append(b, payload...)
}

func gatewayMACOf() l2.MAC { return fuzzConfig().MAC }

func fuzzConfig() Config {
	return Config{
		MTU: 1500, MAC: l2.MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd},
		Subnet: netip.MustParsePrefix("192.168.127.0/24"), Gateway: netip.MustParseAddr("192.168.127.1"),
		Subnet6: netip.MustParsePrefix("fd75:6e65:74:7f::/64"), Gateway6: netip.MustParseAddr("fd75:6e65:74:7f::1"),
		NAT: map[netip.Addr]netip.Addr{netip.MustParseAddr("192.168.127.254"): netip.MustParseAddr("127.0.0.1")},
		Log: slog.New(slog.DiscardHandler),
	}
}

// tcpFrame is a segment whose checksum is right.
func tcpFrame(src, dst netip.Addr, seq uint32, flags header.TCPFlags, data []byte) []byte {
	h := header.TCP(make([]byte, header.TCPMinimumSize+len(data)))
	h.Encode(&header.TCPFields{SrcPort: 4000, DstPort: 80, SeqNum: seq, AckNum: 7, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 1000})
	copy(h[header.TCPMinimumSize:], data)
	h.SetChecksum(^checksum.Checksum(h, pseudoSum(src, dst, protoTCP, len(h))))
	return ipFrame(src, dst, protoTCP, h)
}

func udpFrame(src, dst netip.AddrPort, data []byte) []byte {
	h := header.UDP(make([]byte, udpLen+len(data)))
	h.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(len(h))})
	copy(h[udpLen:], data)
	h.SetChecksum(^checksum.Checksum(h, pseudoSum(src.Addr(), dst.Addr(), protoUDP, len(h))))
	return ipFrame(src.Addr(), dst.Addr(), protoUDP, h)
}

func icmpFrame(src, dst netip.Addr, typ byte, body []byte) []byte {
	m := append([]byte{typ, 0, 0, 0}, body...)
	proto, sum := protoICMP, uint16(0)
	if src.Is6() {
		proto, sum = protoICMPv6, pseudoSum(src, dst, protoICMPv6, len(m))
	}
	binary.BigEndian.PutUint16(m[2:], ^checksum.Checksum(m, sum))
	b := ipFrame(src, dst, proto, m)
	if src.Is6() {
		b[ethLen+7] = 255 // of this link
	}
	return b
}

func arpFrame(op header.ARPOp, sender, target netip.Addr) []byte {
	h := header.ARP(make([]byte, header.ARPSize))
	h.SetIPv4OverEthernet()
	h.SetOp(op)
	copy(h.HardwareAddressSender(), guestMAC[:])
	copy(h.ProtocolAddressSender(), sender.AsSlice())
	copy(h.ProtocolAddressTarget(), target.AsSlice())
	return ether(broadcast, 0x0806, h)
}

// lone is a network without Run, and a port on it that is not connected: whatever goes there goes nowhere.
func lone(t testing.TB) (*Network, *l2.Port) {
	n, err := New(fuzzConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	a, b, err := socketpair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return n, n.sw.NewPort(l2.Stream(a, l2.Options{}), l2.PortConfig{})
}

// seeds has a frame of each kind.
func seeds() [][]byte {
	gw, gw6, world := fuzzConfig().Gateway, fuzzConfig().Gateway6, netip.MustParseAddr("203.0.113.9")
	world6 := netip.MustParseAddr("2001:db8::9")
	ap := netip.AddrPortFrom
	discover := make([]byte, 300)
	copy(discover, []byte{1, 1, 6, 0, 1, 2, 3, 4})
	copy(discover[28:], guestMAC[:])
	copy(discover[236:], []byte{99, 130, 83, 99, 53, 1, 1, 255})
	target := func(a netip.Addr) []byte { return append(make([]byte, 4), a.AsSlice()...) }
	linkLocal := netip.MustParseAddr("fe80::2")
	frames := [][]byte{
		arpFrame(header.ARPRequest, guest4, gw), arpFrame(header.ARPReply, guest4, gw), arpFrame(header.ARPRequest, netip.IPv4Unspecified(), gw),
		tcpFrame(guest4, world, 1, header.TCPFlagSyn, nil), tcpFrame(guest4, gw, 1, header.TCPFlagSyn, nil),
		tcpFrame(guest4, world, 2, header.TCPFlagAck|header.TCPFlagPsh, []byte("hello")), tcpFrame(guest6, gw6, 1, header.TCPFlagRst, nil),
		udpFrame(ap(guest4, 1), ap(gw, 53), []byte("hello")), udpFrame(ap(guest4, 1), ap(gw, 9), []byte("hello")),
		udpFrame(ap(guest6, 1), ap(gw6, 53), []byte("hello")), udpFrame(ap(guest4, 1), ap(world, 9), []byte("hello")),
		udpFrame(ap(netip.IPv4Unspecified(), 68), ap(broadcast4, 67), discover), udpFrame(ap(guest4, 68), ap(gw, 67), discover),
		udpFrame(ap(linkLocal, 546), ap(allDHCPv6, 547), []byte{11, 1, 2, 3, 0, 1, 0, 4, 0, 1, 2, 3}),
		icmpFrame(guest4, gw, 8, make([]byte, 60)), icmpFrame(guest6, gw6, 128, make([]byte, 60)), icmpFrame(guest4, world, 8, make([]byte, 60)),
		icmpFrame(linkLocal, netip.MustParseAddr("ff02::2"), 133, make([]byte, 4)),
		icmpFrame(guest6, netip.MustParseAddr("ff02::1:ff00:1"), 135, append(target(gw6), 1, 1, 2, 0, 0, 0, 0, 2)),
		icmpFrame(guest6, gw6, 136, append(target(guest6), 2, 1, 2, 0, 0, 0, 0, 2)),
		icmpFrame(guest6, world6, 1, append(make([]byte, 4), ipFrame(world6, guest6, protoUDP, make([]byte, 8))[ethLen:]...)),
		icmpFrame(guest4, world, 3, append(make([]byte, 4), ipFrame(world, guest4, protoUDP, make([]byte, 8))[ethLen:]...)),
		ipFrame(guest6, gw6, 44, append([]byte{17, 0, 0, 1, 0, 0, 0, 9}, make([]byte, 16)...)),
		ether(gatewayMACOf(), 0x8100, make([]byte, 60)), ether(broadcast, 0x88cc, make([]byte, 60)),
	}
	fragment := udpFrame(ap(guest4, 1), ap(gw, 53), make([]byte, 64))
	h := header.IPv4(fragment[ethLen:])
	h.SetFlagsFragmentOffset(header.IPv4FlagMoreFragments, 0)
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	return append(frames, fragment)
}

// FuzzDeliver throws frames at the gateway, as the switch would: at least an Ethernet header long, two in a batch. There is no crash, and the
// gateway still answers. (TestSoak has the same with machines.)
func FuzzDeliver(f *testing.F) {
	for i, s := range seeds() {
		f.Add(s, s, uint8(i%3), false)
		f.Add(s, seeds()[0], uint8(0), true)
	}
	n, port := lone(f)
	sockets, err := n.ListenUDP(53)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { sockets.Close() })
	ask := []byte("are you there")
	f.Fuzz(func(t *testing.T, one, two []byte, flags uint8, torn bool) {
		var batch []l2.Frame
		for _, b := range [][]byte{one, two} {
			if len(b) < ethLen || len(b) > l2.MaxFrame {
				continue
			}
			// The switch would drop what claims to come from the gateway, or a sum outside of the frame.
			fr := l2.Frame{Head: b, Virtio: l2.Virtio{Flags: flags & l2.DataValid}}
			if flags&l2.NeedsCsum != 0 && len(b) > ethLen+ipv4Len+18 {
				fr.Virtio = l2.Virtio{Flags: l2.NeedsCsum, CsumStart: ethLen + ipv4Len, CsumOffset: uint16(6 + 10*(flags>>7))}
			}
			if torn {
				fr.Head, fr.Tail = b[:ethLen], [][]byte{b[ethLen:]}
			}
			batch = append(batch, fr)
		}
		n.Deliver(port, batch)
		probe := udpFrame(netip.AddrPortFrom(netip.MustParseAddr("192.168.127.77"), 9), netip.AddrPortFrom(fuzzConfig().Gateway, 53), ask)
		n.Deliver(port, []l2.Frame{{Head: probe}})
		sockets.SetReadDeadline(time.Now().Add(10 * time.Second))
		for buf := make([]byte, 65536); ; {
			k, _, err := sockets.ReadFrom(buf)
			if err != nil {
				t.Fatalf("the gateway is dead after %x, %x: %v", one, two, err)
			}
			if bytes.Equal(buf[:k], ask) {
				return
			}
		}
	})
}

// TestTrain: segments that follow each other become one, and nothing else does.
func TestTrain(t *testing.T) {
	n, port := lone(t)
	g := n.guestOf(port)
	world, world6 := netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8::9")
	data := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, 1000+i) }
	ack := header.TCPFlags(header.TCPFlagAck)
	row := func(src, dst netip.Addr, count int) (frames [][]byte, want []byte) {
		seq := uint32(0xfffffc00) // it wraps
		for i := range count {
			frames = append(frames, tcpFrame(src, dst, seq, ack, data(i)))
			want = append(want, data(i)...)
			seq += uint32(len(data(i)))
		}
		return frames, want
	}
	four, bytes4 := row(guest4, world, 4)
	six, bytes6 := row(guest6, world6, 3)
	padded := append(slices.Clone(four[1]), 0, 0, 0)
	damaged := slices.Clone(four[1])
	damaged[len(damaged)-1] ^= 1
	push := tcpFrame(guest4, world, 0xfffffc00+1000, ack|header.TCPFlagPsh, data(1))
	many, _ := row(guest4, world, 100)
	for _, c := range []struct {
		name   string
		frames [][]byte
		want   int // frames in the first packet
		data   []byte
	}{
		{"in a row", four, 4, bytes4},
		{"IPv6", six, 3, bytes6},
		{"one", four[:1], 1, nil},
		{"a gap", [][]byte{four[0], four[2]}, 1, nil},
		{"the same again", [][]byte{four[0], four[0]}, 1, nil},
		{"padding at the end", [][]byte{four[0], padded}, 2, slices.Concat(data(0), data(1))},
		{"a wrong checksum", [][]byte{four[0], damaged}, 1, nil},
		{"a push is the last", [][]byte{four[0], push, four[2]}, 2, slices.Concat(data(0), data(1))},
		{"a FIN", [][]byte{four[0], tcpFrame(guest4, world, 0xfffffc00+1000, ack|header.TCPFlagFin, data(1))}, 1, nil},
		{"another destination", [][]byte{four[0], tcpFrame(guest4, netip.MustParseAddr("203.0.113.8"), 0xfffffc00+1000, ack, data(1))}, 1, nil},
		{"something else", [][]byte{four[0], udpFrame(netip.AddrPortFrom(guest4, 1), netip.AddrPortFrom(world, 9), data(1))}, 1, nil},
		{"too much for one packet", many, 63, nil},
	} {
		var frames []l2.Frame
		for _, b := range c.frames {
			frames = append(frames, l2.Frame{Head: b})
		}
		g.p.decode(c.frames[0])
		first := g.p
		if got := g.takeTCP(frames); got != c.want {
			t.Errorf("%s: %d frames, want %d", c.name, got, c.want)
			continue
		}
		if c.data == nil {
			continue
		}
		size := len(first.ip()) - (len(first.payload()) - header.TCPMinimumSize) + len(c.data)
		head, body := couple(&first, frames[1:c.want], size)
		if !bytes.Equal(body.AsSlice(), c.data) {
			t.Errorf("%s: not the same data", c.name)
		}
		var p packet
		if whole := slices.Concat(first.frame[:ethLen], head.AsSlice(), body.AsSlice()); !p.decode(whole) || len(p.frame) != len(whole) {
			t.Errorf("%s: not an IP packet", c.name)
		}
		head.Release()
		body.Release()
	}
}

// TestDatagrams: datagrams that follow each other become one burst, and nothing else does.
func TestDatagrams(t *testing.T) {
	n, port := lone(t)
	g := n.guestOf(port)
	client, server := netip.AddrPortFrom(guest4, 9), netip.MustParseAddrPort("203.0.113.9:9")
	client6, server6 := netip.AddrPortFrom(guest6, 9), netip.MustParseAddrPort("[2001:db8::9]:9")
	datagram := func(size int) []byte { return udpFrame(client, server, make([]byte, size)) }
	datagram6 := func(size int) []byte { return udpFrame(client6, server6, make([]byte, size)) }
	// changed has another byte in the IP header, whose sum is right.
	changed := func(b []byte, at int, to byte) []byte {
		b = slices.Clone(b)
		b[ethLen+at] = to
		if h := header.IPv4(b[ethLen:]); h[0]>>4 == 4 {
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
		}
		return b
	}
	damaged := datagram(100)
	damaged[len(damaged)-1] ^= 1
	other := udpFrame(client, netip.MustParseAddrPort("203.0.113.9:10"), make([]byte, 100))
	for _, c := range []struct {
		name   string
		frames [][]byte
		want   int
	}{
		{"one", [][]byte{datagram(100)}, 1},
		{"in a row", slices.Repeat([][]byte{datagram(100)}, 3), 3},
		{"IPv6", slices.Repeat([][]byte{datagram6(100)}, 3), 3},
		{"a shorter one is the last", [][]byte{datagram(100), datagram(100), datagram(9), datagram(9)}, 3},
		{"a longer one", [][]byte{datagram(100), datagram(101)}, 1},
		{"one with nothing in it", [][]byte{datagram(100), datagram(0)}, 1},
		{"nothing in the first", [][]byte{datagram(0), datagram(0)}, 1},
		{"padding", [][]byte{datagram(100), append(datagram(9), 0, 0, 0)}, 2},
		{"a wrong checksum", [][]byte{datagram(100), damaged}, 1},
		{"another port", [][]byte{datagram(100), other}, 1},
		{"another port of its own", [][]byte{datagram(100), udpFrame(netip.AddrPortFrom(guest4, 8), server, make([]byte, 100))}, 1},
		{"another destination", [][]byte{datagram(100), udpFrame(client, netip.MustParseAddrPort("203.0.113.8:9"), make([]byte, 100))}, 1},
		{"another version", [][]byte{datagram(100), datagram6(100)}, 1},
		{"another class", [][]byte{datagram(100), changed(datagram(100), 1, 8)}, 1},
		{"it may be cut", [][]byte{datagram(100), changed(datagram(100), 6, 0)}, 1},
		{"a fragment", [][]byte{datagram(100), changed(datagram(100), 6, 0x20)}, 1},
		{"another TTL", [][]byte{datagram(100), changed(datagram(100), 8, 3)}, 1},
		{"another hop limit", [][]byte{datagram6(100), changed(datagram6(100), 7, 3)}, 1},
		{"another flow label", [][]byte{datagram6(100), changed(datagram6(100), 3, 3)}, 1},
		{"something else", [][]byte{datagram(100), tcpFrame(guest4, server.Addr(), 1, header.TCPFlagSyn, nil)}, 1},
		{"only an Ethernet header", [][]byte{datagram(100), datagram(100)[:ethLen]}, 1},
		{"more than one call takes", slices.Repeat([][]byte{datagram(1)}, 70), 64},
		{"more than one packet takes", slices.Repeat([][]byte{datagram(1472)}, 50), 44},
	} {
		var frames []l2.Frame
		for _, b := range c.frames {
			frames = append(frames, l2.Frame{Head: b})
		}
		if !g.p.decode(c.frames[0]) {
			t.Fatalf("%s: not IP", c.name)
		}
		if got := g.takeUDP(frames); got != c.want {
			t.Errorf("%s: %d frames, want %d", c.name, got, c.want)
		}
		if slices.ContainsFunc(g.burst[:], func(b []byte) bool { return b != nil }) {
			t.Errorf("%s: frames are kept", c.name)
		}
	}
}

// TestAddresses: what a configuration means, and which are none.
func TestAddresses(t *testing.T) {
	a := netip.MustParseAddr
	for name, change := range map[string]func(*Config){
		"small MTU":              func(c *Config) { c.MTU = 1279 },
		"no MAC":                 func(c *Config) { c.MAC = l2.MAC{} },
		"a group's MAC":          func(c *Config) { c.MAC = broadcast },
		"no subnet":              func(c *Config) { c.Subnet = netip.Prefix{} },
		"gateway elsewhere":      func(c *Config) { c.Gateway = a("192.168.126.1") },
		"gateway is the last":    func(c *Config) { c.Gateway = a("192.168.127.255") },
		"IPv6 not /64":           func(c *Config) { c.Subnet6 = netip.MustParsePrefix("fd00::/48") },
		"IPv6 gateway elsewhere": func(c *Config) { c.Gateway6 = a("fd00::1") },
		"virtual elsewhere":      func(c *Config) { c.VirtualIPs = []netip.Addr{a("10.0.0.1")} },
		"NAT to nowhere":         func(c *Config) { c.NAT = map[netip.Addr]netip.Addr{a("192.168.127.254"): {}} },
		"lease twice": func(c *Config) {
			c.Leases = map[netip.Addr]l2.MAC{a("192.168.127.5"): guestMAC, a("192.168.127.6"): guestMAC}
		},
	} {
		cfg := fuzzConfig()
		change(&cfg)
		if n, err := New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
			n.Close()
		}
	}
	cfg := fuzzConfig()
	addrs, err := newAddresses(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.LinkLocal = true
	with, _ := newAddresses(cfg)
	for dst, want := range map[string]string{
		"203.0.113.9": "203.0.113.9", "192.168.127.254": "127.0.0.1", "2001:db8::9": "2001:db8::9",
		"192.168.127.1": "", "192.168.127.7": "", "127.0.0.1": "", "0.0.0.0": "", "224.0.0.251": "", "255.255.255.255": "",
		"::1": "", "fe80::1": "", "ff02::1": "", "::ffff:127.0.0.1": "", "fd75:6e65:74:7f::9": "", "169.254.169.254": "",
	} {
		got, ok := addrs.resolve(a(dst))
		if ok != (want != "") || ok && got != a(want) {
			t.Errorf("%s: dials %s, %t; want %s", dst, got, ok, want)
		}
	}
	if _, ok := with.resolve(a("169.254.169.254")); !ok {
		t.Error("link-local addresses are refused though they are asked for")
	}
}

// TestStationsAreBounded: who makes up addresses has no more room than others.
func TestStationsAreBounded(t *testing.T) {
	n, port := lone(t)
	for i := range 1000 {
		src := netip.AddrFrom16([16]byte{0xfd, 0x75, 0x6e, 0x65, 0, 0x74, 0, 0x7f, 14: byte(i >> 8), 15: byte(i) | 2})
		n.Deliver(port, []l2.Frame{{Head: udpFrame(netip.AddrPortFrom(src, 1), netip.AddrPortFrom(fuzzConfig().Gateway6, 9), nil)}})
	}
	total := 0
	for i := range n.stations.shards {
		total += len(n.stations.shards[i].m)
	}
	if total > maxStations || len(n.guestOf(port).known) > maxStations {
		t.Errorf("one port has %d addresses", total)
	}
	runtime.KeepAlive(port)
}

// TestCloseWithoutRun leaves nothing behind.
func TestCloseWithoutRun(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	n, err := New(fuzzConfig())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.ListenTCP(80); err != nil {
		t.Fatal(err)
	}
	n.Close()
	n.Close()
}
