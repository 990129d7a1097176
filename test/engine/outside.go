package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
)

// The pretend internet's servers. It has no route to anything but the pretend host's own addresses.
var (
	FarAddr  = netip.MustParseAddr("198.51.100.1")
	FarAddr6 = netip.MustParseAddr("2001:db8:1::1")
	DNSAddr  = netip.MustParseAddr("198.51.100.53")
)

// FarName is the name that the pretend internet's DNS server knows FarAddr and FarAddr6 by.
const FarName = "www.example.test"

// Outside is a network namespace beyond the pretend host's uplink. Its servers listen on all its addresses:
//
//	80/tcp  HTTP: answers with "peer ADDRESS:PORT" and the request's body
//	7/tcp   echo
//	7/udp   answers with "peer ADDRESS:PORT" and the datagram, on one line
//	53      DNS, udp and tcp, for FarName only
type Outside struct {
	ns      *netns.NS
	closers []io.Closer
	wg      sync.WaitGroup
}

func newOutside() (*Outside, error) {
	type result struct {
		ns  *netns.NS
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with this goroutine
		var r result
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			r.ns, r.err = netns.Current()
		}
		done <- r
	}()
	r := <-done
	if r.err != nil {
		return nil, fmt.Errorf("make the outside: %w", r.err)
	}
	return &Outside{ns: r.ns}, nil
}

// Do runs f on a thread in the outside's network namespace.
func (o *Outside) Do(f func() error) error { return o.ns.Do(f) }

// NS is the outside's network namespace.
func (o *Outside) NS() *netns.NS { return o.ns }

func (o *Outside) serve() error {
	return o.ns.Do(func() error {
		far := []netip.Prefix{netip.PrefixFrom(FarAddr, 32), netip.PrefixFrom(FarAddr6, 128), netip.PrefixFrom(DNSAddr, 32)}
		if err := configure("lo", far...); err != nil {
			return err
		}
		for port, serve := range map[string]func(net.Listener){":80": serveHTTP, ":7": eachConn(echo), ":53": eachConn(dnsConn)} {
			l, err := net.Listen("tcp", port)
			if err != nil {
				return err
			}
			o.run(l, func() { serve(l) })
		}
		for port, serve := range map[string]func(net.PacketConn){":7": serveUDP, ":53": serveDNS} {
			// One socket an address, so that the answer comes from the address that was asked.
			for _, a := range []netip.Addr{FarAddr, FarAddr6, DNSAddr, RouterAddr.Addr(), Router6.Addr()} {
				c, err := net.ListenPacket("udp", net.JoinHostPort(a.String(), port[1:]))
				if err != nil {
					return err
				}
				o.run(c, func() { serve(c) })
			}
		}
		return nil
	})
}

func (o *Outside) run(c io.Closer, serve func()) {
	o.closers = append(o.closers, c)
	o.wg.Go(serve)
}

func (o *Outside) close() {
	for _, c := range o.closers {
		c.Close()
	}
	o.wg.Wait()
	o.ns.Close()
}

func serveHTTP(l net.Listener) {
	http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "peer %s\n", plain(r.RemoteAddr))
		io.Copy(w, r.Body)
	}))
}

// plain writes an address of a dual-stack socket as what it is.
func plain(addr string) string {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return addr
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

// eachConn serves every connection of a listener until that closes; connections do not outlive it by much.
func eachConn(serve func(net.Conn)) func(net.Listener) {
	return func(l net.Listener) {
		var wg sync.WaitGroup
		defer wg.Wait()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			wg.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
				serve(c)
			})
		}
	}
}

func echo(c net.Conn) { io.Copy(c, c) }

func serveUDP(c net.PacketConn) {
	b := make([]byte, 64<<10)
	for {
		n, peer, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			c.WriteTo(fmt.Appendf(nil, "peer %s %s", plain(peer.String()), b[:n]), peer)
		}
	}
}

func serveDNS(c net.PacketConn) {
	b := make([]byte, 4096)
	for {
		n, peer, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		if answer, err := answerDNS(b[:n]); err == nil {
			c.WriteTo(answer, peer)
		}
	}
}

func dnsConn(c net.Conn) {
	var size [2]byte
	for {
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		b := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		answer, err := answerDNS(b)
		if err != nil {
			return
		}
		c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
	}
}

func answerDNS(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || len(m.Questions) != 1 {
		return nil, fmt.Errorf("query: %w", errors.Join(err))
	}
	m.Header = dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true, RecursionDesired: m.RecursionDesired}
	m.Additionals = nil
	q := m.Questions[0]
	head := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type, TTL: 1}
	switch {
	case !strings.EqualFold(q.Name.String(), FarName+"."):
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{Header: head, Body: &dnsmessage.AResource{A: FarAddr.As4()}}}
	case q.Type == dnsmessage.TypeAAAA:
		m.Answers = []dnsmessage.Resource{{Header: head, Body: &dnsmessage.AAAAResource{AAAA: FarAddr6.As16()}}}
	}
	return m.Pack()
}
