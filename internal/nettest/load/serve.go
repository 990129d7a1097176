package load

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
)

// chunk is how many bytes are written and read at a time.
const chunk = 256 << 10

// What a client wants, its first byte.
const (
	sink   = 'u' // it sends
	source = 'd' // it receives
	echo   = 'r' // every byte comes back
)

// Serve starts a server in ns, or beside the test if that is nil, on a port of the kernel's choice.
func Serve(t testing.TB, ns *netns.NS, addr netip.Addr) (to string) {
	t.Helper()
	return Start(t, ns, nil, "serve", netip.AddrPortFrom(addr, 0)).Line()
}

func serve(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { defer c.Close(); serveConn(c) }()
	}
}

func serveConn(c net.Conn) {
	b := make([]byte, 1)
	if _, err := io.ReadFull(c, b); err != nil {
		return
	}
	switch b[0] {
	case sink:
		fmt.Fprintln(c, count(c, time.Time{}))
	case source:
		for buf := make([]byte, chunk); ; {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	case echo:
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}
}

// count reads without splicing until the end, or until a time, and returns how many bytes that was.
func count(c net.Conn, end time.Time) (n int64) {
	c.SetReadDeadline(end)
	for buf := make([]byte, chunk); ; {
		m, err := c.Read(buf)
		n += int64(m)
		if err != nil {
			return n
		}
	}
}
