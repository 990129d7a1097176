package engine

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/usernet/usernet/internal/netns"
)

// Dial connects from a namespace. The address must be a literal, so that no other goroutine is involved.
func Dial(ctx context.Context, ns *netns.NS, network, addr string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("dial: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var c net.Conn
	err := ns.Do(func() (err error) {
		var d net.Dialer
		d.SetMultipathTCP(false)
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Get fetches a page over HTTP from a namespace, on a connection of its own.
func Get(ctx context.Context, ns *netns.NS, addr string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tr := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return Dial(ctx, ns, network, addr)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/", nil)
	if err != nil {
		return "", err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return string(b), err
}

// AskUDP sends a datagram from a namespace and returns the answer. A datagram may be lost, so it asks three times.
func AskUDP(ctx context.Context, ns *netns.NS, addr, text string) (string, error) {
	c, err := Dial(ctx, ns, "udp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b := make([]byte, 64<<10)
	for range 3 {
		if _, err = c.Write([]byte(text)); err != nil {
			continue
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		var n int
		if n, err = c.Read(b); err == nil {
			return string(b[:n]), nil
		}
	}
	return "", fmt.Errorf("ask %s: %w", addr, err)
}
