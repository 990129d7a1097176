package usermode

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/icmperror"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// prober is a socket in a container whose errors can be read.
type prober struct {
	fd int
	v4 bool
}

// newProber makes a UDP or ICMP socket that is connected to the address, with the TTL and with or without DF.
func newProber(t *testing.T, ns *netns.NS, kind, proto int, to netip.AddrPort, hops int, whole bool) *prober {
	t.Helper()
	p := &prober{fd: -1, v4: to.Addr().Is4()}
	err := ns.Do(func() (err error) {
		family, level, ttl, discover := unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER
		var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		if p.v4 {
			family, level, ttl, discover = unix.AF_INET, unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER
			sa = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		}
		if p.fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, proto); err != nil {
			return err
		}
		value := unix.IP_PMTUDISC_DONT
		if whole {
			value = unix.IP_PMTUDISC_PROBE // DF, whatever the container's kernel has learnt before
		}
		if err := unix.SetsockoptInt(p.fd, level, ttl, hops); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(p.fd, level, discover, value); err != nil {
			return err
		}
		if err := icmperror.Ask(p.fd, p.v4); err != nil {
			return err
		}
		return unix.Connect(p.fd, sa)
	})
	t.Cleanup(func() { unix.Close(p.fd) })
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// next waits for an error.
func (p *prober) next(t *testing.T) icmperror.Message {
	t.Helper()
	var q icmperror.Queue
	var e icmperror.Entry
	eventually(t, "an ICMP error", func() (more bool) {
		e, more = q.Read(p.fd)
		return more
	})
	return e.Message
}

func unreachable(v4 bool, code4 header.ICMPv4Code, code6 header.ICMPv6Code) icmperror.Message {
	if v4 {
		return icmperror.Message{Type: uint8(header.ICMPv4DstUnreachable), Code: uint8(code4)}
	}
	return icmperror.Message{Type: uint8(header.ICMPv6DstUnreachable), Code: uint8(code6)}
}

func timeExceeded(v4 bool) icmperror.Message {
	if v4 {
		return icmperror.Message{Type: uint8(header.ICMPv4TimeExceeded)}
	}
	return icmperror.Message{Type: uint8(header.ICMPv6TimeExceeded)}
}

// What routers and the destination have to say about a container's packets reaches the container, from them.
func TestErrorsComeBack(t *testing.T) {
	b := newBed(t, usual)
	nettest.World(t)
	type test struct {
		name  string
		to    netip.Addr
		hops  int
		size  int
		times int // 2: the second one meets what the host's kernel has learnt
		want  icmperror.Message
	}
	for _, v4 := range []bool{true, false} {
		far, closed, router := nettest.Far6, nettest.Closed6, nettest.Router6
		if v4 {
			far, closed, router = nettest.Far4, nettest.Closed4, nettest.Router4
		}
		from := func(a netip.Addr, e icmperror.Message) icmperror.Message { e.From = a; return e }
		both := []test{
			{"time exceeded", far, 1, 8, 2, from(router, timeExceeded(v4))},
			{"prohibited", closed, 64, 8, 1, from(router, unreachable(v4, header.ICMPv4AdminProhibited, header.ICMPv6Prohibited))},
			{"too big", far, 64, nettest.Narrow, 2, icmperror.TooBig(v4, nettest.Narrow)},
		}
		udp := append(both, test{"port unreachable", far, 2, 8, 2,
			from(far, unreachable(v4, header.ICMPv4PortUnreachable, header.ICMPv6PortUnreachable))})
		run := func(kind string, send func(t *testing.T, c test) *prober, tests []test) {
			for _, c := range tests {
				t.Run(fmt.Sprintf("%s/v4=%t/%s", kind, v4, c.name), func(t *testing.T) {
					for i := range c.times {
						got := send(t, c).next(t)
						if !c.want.From.IsValid() {
							got.From = c.want.From // the router, and then the host, in the destination's name
						}
						if got != c.want {
							t.Errorf("packet %d: %+v, want %+v", i, got, c.want)
						}
					}
				})
			}
		}
		run("udp", func(t *testing.T, c test) *prober {
			p := newProber(t, b.container, unix.SOCK_DGRAM, 0, netip.AddrPortFrom(c.to, 33434), c.hops, true)
			if _, err := unix.Write(p.fd, make([]byte, c.size)); err != nil {
				t.Fatal(err)
			}
			return p
		}, udp)
		run("echo", func(t *testing.T, c test) *prober {
			proto, m := unix.IPPROTO_ICMPV6, make([]byte, icmpHdrLen+c.size)
			m[0] = requestType(v4)
			if v4 {
				proto = unix.IPPROTO_ICMP
				header.ICMPv4(m).SetChecksum(header.ICMPv4Checksum(m, 0))
			}
			p := newProber(t, b.container, unix.SOCK_RAW, proto, netip.AddrPortFrom(c.to, 0), c.hops, true)
			if _, err := unix.Write(p.fd, m); err != nil {
				t.Fatal(err)
			}
			return p
		}, both)
	}
}

// A datagram that may be cut arrives, however narrow the way.
func TestDatagramsAreCutOnTheWay(t *testing.T) {
	b := newBed(t, usual)
	far := nettest.World(t)
	var to *net.UDPConn
	err := far.Do(func() (err error) {
		to, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(nettest.Far4, 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	at := to.LocalAddr().(*net.UDPAddr).AddrPort()
	// One with DF first: the flow's socket must change its mind.
	p := newProber(t, b.container, unix.SOCK_DGRAM, 0, at, 64, true)
	for i, size := range []int{1, nettest.Narrow, 4000} {
		if i > 0 {
			if err := unix.SetsockoptInt(p.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := unix.Write(p.fd, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		to.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, _, err := to.ReadFrom(make([]byte, maxDatagram)); n != size || err != nil {
			t.Errorf("received %d bytes, %v, want %d", n, err, size)
		}
	}
}
