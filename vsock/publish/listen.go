package publish

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/usernet/usernet"
)

// sockets are what is open for one port: at one address, or at the wildcards of both families.
type sockets struct {
	port uint16
	tcp  []*net.TCPListener
	udp  []*net.UDPConn
}

func (s *sockets) close() {
	for _, l := range s.tcp {
		l.Close()
	}
	for _, c := range s.udp {
		c.Close()
	}
}

// ephemeralTries bounds how often the system is asked for a free port that may turn out taken in the other family.
const ephemeralTries = 64

// maxRange is how many ports a range may have: each may have to be tried.
const maxRange = 4096

// openFirst opens the first port that is free of those that the question wants.
func (s *Server) openFirst(q message) (*sockets, error) {
	tries := ephemeralTries
	if q.Port != 0 {
		tries = max(int(q.End)-int(q.Port), 0) + 1
	}
	if tries > maxRange {
		return nil, fmt.Errorf("%w: a range of more than %d ports", usernet.ErrInvalid, maxRange)
	}
	// What the system chose in vain stays open until the end, or it would choose the same again.
	var spoiled []*sockets
	defer func() {
		for _, o := range spoiled {
			o.close()
		}
	}()
	var first error
	for i := range tries {
		port := q.Port
		if port != 0 {
			port += uint16(i)
		}
		opened, err := s.open(key{q.Proto, q.Addr, port})
		if err == nil {
			return opened, nil
		}
		if opened != nil {
			spoiled = append(spoiled, opened)
		}
		if !errors.Is(err, usernet.ErrPortTaken) {
			return nil, err
		}
		if first == nil {
			first = err
		}
	}
	if tries > 1 && q.Port != 0 {
		return nil, fmt.Errorf("no port of %d-%d is free on the host: %w", q.Port, q.End, first)
	}
	return nil, first
}

// open opens a port at all addresses that are wanted, 0 meaning one of the system's choice. After an error it may return what it
// had opened.
func (s *Server) open(k key) (*sockets, error) {
	addrs := []netip.Addr{k.addr}
	if !k.addr.IsValid() {
		addrs = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	o := &sockets{port: k.port}
	for i, a := range addrs {
		at := netip.AddrPortFrom(a, o.port)
		if o.port != 0 {
			if who := s.holder(k.proto, at); who != "" {
				return o, &takenError{o.port, errors.New(who)}
			}
		}
		err := o.bind(k.proto, at)
		switch {
		case i > 0 && isAny(err, noSuchFamily):
			continue // the host does without IPv6
		case isAny(err, inUse):
			o.close()
			return nil, &takenError{at.Port(), err}
		case isAny(err, notAllowed):
			o.close()
			return nil, fmt.Errorf("port %d is not for the gateway to open on the host: %w", at.Port(), err)
		case err != nil:
			o.close()
			return nil, err
		}
	}
	return o, nil
}

// takenError is a conflict over a port of the host.
type takenError struct {
	port uint16
	why  error
}

func (e *takenError) Error() string {
	return "port " + strconv.Itoa(int(e.port)) + " is taken on the host: " + e.why.Error()
}

func (e *takenError) Unwrap() []error { return []error{usernet.ErrPortTaken, e.why} }

// bind opens one more socket; if the port is 0, it becomes the one that the system chose.
func (o *sockets) bind(proto usernet.Proto, at netip.AddrPort) error {
	family := "6"
	if at.Addr().Is4() {
		family = "4"
	}
	if proto == usernet.UDP {
		conn, err := net.ListenUDP("udp"+family, net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		o.udp = append(o.udp, conn)
		o.port = uint16(conn.LocalAddr().(*net.UDPAddr).Port)
		return nil
	}
	// Plain TCP: connections of MPTCP cannot be spliced.
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	l, err := cfg.Listen(context.Background(), "tcp"+family, at.String())
	if err != nil {
		return err
	}
	o.tcp = append(o.tcp, l.(*net.TCPListener))
	o.port = uint16(l.Addr().(*net.TCPAddr).Port)
	return nil
}

func isAny(err error, targets []error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}
