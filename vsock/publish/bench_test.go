package publish

import (
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// What the guest's end does with a connection.
var guestEnds = map[string]func(net.Conn){
	"sink": func(c net.Conn) {
		io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, make([]byte, 256<<10))
		c.Write([]byte{1})
	},
	"source": func(c net.Conn) {
		for b := make([]byte, 256<<10); ; {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	},
	"echo": func(c net.Conn) {
		for b := make([]byte, 64); ; {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			c.Write(b[:n])
		}
	},
}

// bareRelay is a relay of the least kind to a guest's end, in processes of their own.
func bareRelay(b *testing.B, end string) (at string) {
	path := filepath.Join(b.TempDir(), "guest.sock")
	startEnd(b, "bare-guest", path, end)
	return startEnd(b, "bare-host", path, end)
}

// published is the same by a Server and a Client.
func published(b *testing.B, end string) (at string) {
	path := filepath.Join(b.TempDir(), "gateway.sock")
	startEnd(b, "published-host", path, end)
	return startEnd(b, "published-guest", path, end)
}

// BenchmarkPort compares published ports with bare relays over the same kind of socket.
func BenchmarkPort(b *testing.B) {
	paths := []struct {
		name string
		open func(*testing.B, string) string
	}{{"bare", bareRelay}, {"published", published}}
	dial := func(b *testing.B, at string) *net.TCPConn {
		conn, err := net.DialTimeout("tcp", at, within)
		if err != nil {
			b.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(5 * within))
		return conn.(*net.TCPConn)
	}
	block := make([]byte, 256<<10)
	for _, path := range paths {
		b.Run("up/"+path.name, func(b *testing.B) {
			conn := dial(b, path.open(b, "sink"))
			defer conn.Close()
			b.SetBytes(int64(len(block)))
			for b.Loop() {
				if _, err := conn.Write(block); err != nil {
					b.Fatal(err)
				}
			}
			conn.CloseWrite()
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				b.Fatal(err)
			}
		})
	}
	for _, path := range paths {
		b.Run("down/"+path.name, func(b *testing.B) {
			conn := dial(b, path.open(b, "source"))
			defer conn.Close()
			buf := make([]byte, len(block))
			b.SetBytes(int64(len(block)))
			for b.Loop() {
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	for _, path := range paths {
		b.Run("exchange/"+path.name, func(b *testing.B) {
			conn := dial(b, path.open(b, "echo"))
			defer conn.Close()
			buf := make([]byte, 64)
			for b.Loop() {
				conn.Write(buf)
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	for _, path := range paths {
		b.Run("connect/"+path.name, func(b *testing.B) {
			at := path.open(b, "echo")
			buf := make([]byte, 64)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					conn, err := net.DialTimeout("tcp", at, within)
					if err != nil {
						b.Error(err)
						return
					}
					conn.SetDeadline(time.Now().Add(within))
					conn.Write(buf)
					if _, err := io.ReadFull(conn, buf); err != nil {
						b.Error(err)
					}
					conn.(*net.TCPConn).SetLinger(0) // no port waits
					conn.Close()
				}
			})
		})
	}
}
