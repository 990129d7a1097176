package publish

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/vsock/proxy"
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

// bareRelay is the least that can be done: a listener, a unix socket dialled for each connection, and io.Copy both ways.
func bareRelay(b *testing.B, end func(net.Conn)) (at string) {
	path := filepath.Join(b.TempDir(), "guest.sock")
	u, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	l, err := cfg.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var running sync.WaitGroup
	b.Cleanup(func() { l.Close(); u.Close(); running.Wait() })
	serve := func(l net.Listener, serve func(net.Conn)) {
		running.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				running.Go(func() {
					defer c.Close()
					serve(c)
				})
			}
		})
	}
	serve(u, end)
	serve(l, func(client net.Conn) {
		guest, err := net.Dial("unix", path)
		if err != nil {
			b.Error(err)
			return
		}
		defer guest.Close()
		var up sync.WaitGroup
		up.Go(func() { io.Copy(guest, client); guest.(*net.UnixConn).CloseWrite() })
		io.Copy(client, guest)
		client.(*net.TCPConn).CloseWrite()
		up.Wait()
	})
	return l.Addr().String()
}

// published is the same by a Server and a Client.
func published(b *testing.B, end func(net.Conn)) (at string) {
	g := newGateway(b, ServerConfig{})
	c, _ := g.guest(nil)
	var running sync.WaitGroup
	b.Cleanup(running.Wait)
	w := mustPublish(b, c, tcp(0), func(_ proxy.Header, conn net.Conn) {
		running.Go(func() {
			defer conn.Close()
			end(conn)
		})
	})
	b.Cleanup(func() { w.Close() })
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(int(w.HostPort())))
}

// BenchmarkPort compares published ports with bare relays over the same kind of socket.
func BenchmarkPort(b *testing.B) {
	paths := []struct {
		name string
		open func(*testing.B, func(net.Conn)) string
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
			conn := dial(b, path.open(b, guestEnds["sink"]))
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
			conn := dial(b, path.open(b, guestEnds["source"]))
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
			conn := dial(b, path.open(b, guestEnds["echo"]))
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
			at := path.open(b, guestEnds["echo"])
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
