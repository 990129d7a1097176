package publish

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/usernet/usernet/vsock/proxy"
)

// device does with streams what hypervisors' devices do: the host's end of one direction is the end of both for the guest, and the
// guest's end of one direction is not heard of.
type device struct {
	t       *testing.T
	gateway *gateway
	running sync.WaitGroup
}

func newDevice(t *testing.T, g *gateway) *device {
	d := &device{t: t, gateway: g}
	t.Cleanup(d.running.Wait)
	return d
}

func (d *device) dial(ctx context.Context) (net.Conn, error) {
	host, err := d.gateway.dial(ctx)
	if err != nil {
		return nil, err
	}
	guest, inner := socketPair(d.t)
	d.running.Go(func() {
		io.Copy(inner, host)
		inner.Close()
	})
	d.running.Go(func() {
		defer host.Close()
		if _, err := io.Copy(host, inner); err == nil {
			awaitClosed(inner)
		}
	})
	return guest, nil
}

// awaitClosed waits until the other end of c is closed, and not only for writing.
func awaitClosed(c *net.UnixConn) {
	for {
		if _, err := c.Write(nil); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func socketPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix"}) // an abstract name
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr)); err != nil {
		t.Fatal(err)
	}
	if b, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// Through a device, each direction has its end, whichever is first, and all of its bytes.
func TestEndsThroughDevice(t *testing.T) {
	g := newDeviceGateway(t, ServerConfig{})
	c, _ := g.guest(newDevice(t, g).dial)
	data := make([]byte, 3<<20+1)
	binary.BigEndian.PutUint64(data[len(data)/2:], rand.Uint64())
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	serve := func(serve func(net.Conn) error) string {
		w := mustPublish(t, c, tcp(0), func(_ proxy.Header, conn net.Conn) {
			running.Go(func() {
				end, relayed := socketPair(t)
				running.Go(func() {
					end.SetDeadline(time.Now().Add(within))
					if err := serve(end); err != nil {
						t.Error(err)
					}
					end.Close()
				})
				Relay(t.Context(), conn, relayed)
			})
		})
		return fmt.Sprintf("127.0.0.1:%d", w.HostPort())
	}

	conn := dialTCP(t, serve(func(c net.Conn) error { // an echo when all is heard
		all, err := io.ReadAll(c)
		if err == nil {
			_, err = c.Write(all)
		}
		return err
	}))
	conn.Write(data)
	conn.CloseWrite()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the client ends first: %d bytes of %d came back, %v", len(got), len(data), err)
	}

	conn = dialTCP(t, serve(func(c net.Conn) error {
		_, err := c.Write(data)
		if err = errors.Join(err, closeWrite(c)); err != nil {
			return err
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "thanks" {
			return fmt.Errorf("the server hears %q, %w", got, err)
		}
		return nil
	}))
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the server ends first: %d bytes of %d came, %v", len(got), len(data), err)
	}
	io.WriteString(conn, "thanks")
	conn.Close()
	eventually(t, "no connection is left", func() bool { return g.Ports()[0].Active+g.Ports()[1].Active == 0 })
}

// A container that resets is not one that ends.
func TestCutThroughDevice(t *testing.T) {
	g := newDeviceGateway(t, ServerConfig{})
	c, _ := g.guest(newDevice(t, g).dial)
	conns := make(chan net.Conn, 1)
	w := mustPublish(t, c, tcp(0), func(_ proxy.Header, conn net.Conn) { conns <- conn })
	conn := dialTCP(t, fmt.Sprintf("127.0.0.1:%d", w.HostPort()))
	stream := <-conns // not before: connect(2) too would tell of a reset
	io.WriteString(stream, "some")
	stream.Close()
	if got, err := io.ReadAll(conn); err == nil {
		t.Errorf("%q, and it looks whole", got)
	}
}

func TestChunks(t *testing.T) {
	a, b := socketPair(t)
	from, to := newChunked(a, nil, a), newChunked(b, nil, b)
	defer a.Close()
	defer b.Close()
	var want []byte
	go func() {
		for i := range 200 {
			from.Write(bytes.Repeat([]byte{byte(i)}, i*i))
		}
		from.CloseWrite()
	}()
	for i := range 200 {
		want = append(want, bytes.Repeat([]byte{byte(i)}, i*i)...)
	}
	if got, err := io.ReadAll(iotest.HalfReader(to)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	if n, err := to.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("behind the end: %d, %v", n, err)
	}
}

// FuzzChunks reads what the other side may have sent.
func FuzzChunks(f *testing.F) {
	f.Add([]byte{0, 0, 0, 3, 'a', 'b', 'c', 0, 0, 0, 0, 'x'})
	f.Add([]byte{0, 0, 0, 3, 'a'})
	f.Add([]byte{0xff, 0, 0, 0})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, wire []byte) {
		var want []byte
		whole, rest := false, wire
		for len(rest) >= 4 {
			n := binary.BigEndian.Uint32(rest)
			if rest = rest[4:]; n == 0 {
				whole = true
				break
			}
			if n > maxChunk {
				break
			}
			part := rest[:min(int(n), len(rest))]
			want, rest = append(want, part...), rest[len(part):]
		}
		early := len(wire) / 3
		socket, peer := socketPair(t)
		defer socket.Close()
		go func() { // in pieces
			defer peer.Close()
			for rest := wire; len(rest) > 0; rest = rest[(len(rest)+1)/2:] {
				peer.Write(rest[:(len(rest)+1)/2])
			}
		}()
		for _, c := range []*chunked{
			newChunked(nil, nil, bytes.NewReader(wire)), newChunked(nil, nil, iotest.OneByteReader(bytes.NewReader(wire))),
			newChunked(nil, wire[:early], bytes.NewReader(wire[early:])), newChunked(socket, nil, socket),
		} {
			got, err := io.ReadAll(iotest.HalfReader(c))
			if !bytes.Equal(got, want) || whole != (err == nil) {
				t.Errorf("%x: %x, %v; want %x, whole: %t", wire, got, err, want, whole)
			}
		}
	})
}
