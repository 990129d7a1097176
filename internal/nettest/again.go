package nettest

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
)

// PortAgain connects from one port of ns to a server that says something and closes, three times in a row. Whoever carries that has
// the first connection in TIME-WAIT when the next one comes.
func PortAgain(t testing.TB, ns *netns.NS, to netip.AddrPort) {
	t.Helper()
	var from *net.TCPAddr
	for i := range 3 {
		c, err := dialFrom(ns, from, to)
		for deadline := time.Now().Add(10 * time.Second); errors.Is(err, unix.EADDRNOTAVAIL) && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond) // the last one's end has not been acknowledged yet
			c, err = dialFrom(ns, from, to)
		}
		if err != nil {
			t.Fatalf("connection %d: %v", i+1, err)
		}
		from = c.LocalAddr().(*net.TCPAddr)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		b, err := io.ReadAll(c)
		if err != nil || len(b) == 0 {
			t.Errorf("connection %d: %q, %v", i+1, b, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// dialFrom dials from any port if from is nil.
func dialFrom(ns *netns.NS, from *net.TCPAddr, to netip.AddrPort) (c net.Conn, err error) {
	d := net.Dialer{Timeout: 10 * time.Second, Control: reuseAddr}
	if from != nil {
		d.LocalAddr = from
	}
	d.SetMultipathTCP(false)
	err = ns.Do(func() (err error) {
		c, err = d.Dial("tcp", to.String())
		return err
	})
	return c, err
}

func reuseAddr(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	if err == nil {
		err = cerr
	}
	return err
}
