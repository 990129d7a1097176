package gvproxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"time"
)

// dialTimeout is how long a tunnel waits for a guest to answer.
const dialTimeout = 30 * time.Second

// carry says OK on conn, dials to and relays until both directions are over, either failed, or ctx is done. early goes first.
func carry(ctx context.Context, s Streams, conn net.Conn, early []byte, to netip.AddrPort) error {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(conn, "OK"); err != nil {
		return err
	}
	dialling, cancel := context.WithTimeout(ctx, dialTimeout)
	guest, err := s.DialGuest(dialling, to)
	cancel()
	if err != nil {
		return err
	}
	defer guest.Close()
	stopGuest := context.AfterFunc(ctx, func() { guest.SetDeadline(time.Unix(1, 0)) })
	defer stopGuest()
	if _, err := guest.Write(early); err != nil {
		return err
	}
	return relay(conn, guest)
}

// relay copies in both directions. The end of one is passed on and the other goes on; an error ends both.
func relay(a, b net.Conn) error {
	there := make(chan error, 1)
	go func() { there <- oneWay(a, b) }()
	back := oneWay(b, a)
	if err := <-there; err != nil {
		return err
	}
	return back
}

func oneWay(to, from net.Conn) error {
	_, err := io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		return half.CloseWrite()
	}
	to.Close()
	from.Close()
	return err
}
