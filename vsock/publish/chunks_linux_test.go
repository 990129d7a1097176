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
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/vsock/proxy"
)

// tcpPair is a connection that a test is both ends of.
func tcpPair(t *testing.T) (client, host *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client = dialTCP(t, l.Addr().String())
	if host, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); host.Close() })
	return client, host
}

// noise is n bytes that differ wherever they are cut.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// relayed is a client, and the guest's end of its stream, with the host's relay between them.
func relayed(t *testing.T) (client *net.TCPConn, guest *chunked, stop func()) {
	t.Helper()
	client, conn := tcpPair(t)
	stream, end := socketPair(t)
	t.Cleanup(func() { end.Close() })
	end.SetDeadline(time.Now().Add(within))
	guest = newChunked(end, nil, end)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { Relay(ctx, newChunked(stream, nil, stream), conn) })
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return client, guest, stop
}

// Writes of every size arrive whole, in both directions at a time, whoever ends first.
func TestSizesThroughRelay(t *testing.T) {
	data := noise(24 << 20) // more than a chunk may have
	for _, tt := range []struct{ total, write, read int }{
		{2000, 1, 7}, {1 << 20, 4091, 64 << 10}, {1 << 20, 4096, 4096}, {1 << 20, 4097, 100},
		{4 << 20, spliceFrom, spliceFrom + 1}, {4 << 20, blockSize, blockSize}, {8 << 20, blockSize + 1, 10_000}, {len(data), len(data), 1 << 20},
	} {
		t.Run(fmt.Sprintf("%d by %d", tt.total, tt.write), func(t *testing.T) {
			client, guest, _ := relayed(t)
			ends := []interface {
				io.ReadWriteCloser
				CloseWrite() error
			}{client, guest}
			var running sync.WaitGroup
			for i, to := range ends {
				from := ends[1-i]
				running.Go(func() {
					for rest := data[:tt.total]; len(rest) > 0; {
						n, err := to.Write(rest[:min(tt.write, len(rest))])
						if err != nil {
							t.Error(err)
							return
						}
						rest = rest[n:]
					}
					if err := to.CloseWrite(); err != nil {
						t.Error(err)
					}
				})
				running.Go(func() {
					var got bytes.Buffer
					_, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{from}, make([]byte, tt.read))
					if err != nil || !bytes.Equal(got.Bytes(), data[:tt.total]) {
						t.Errorf("end %d: %d bytes of %d, %v", i, got.Len(), tt.total, err)
					}
				})
			}
			running.Wait()
		})
	}
}

// waiting has size bytes or more wait in a connection, and returns its other end, and what waits.
func waiting(t *testing.T, size int) (in *inlet, data []byte) {
	t.Helper()
	client, host := tcpPair(t)
	host.SetReadBuffer(4 * size)
	data = noise(size)
	go client.Write(data)
	in = newInlet(host)
	eventually(t, "there is enough", func() bool { return in.await() == nil && in.queued >= spliceFrom })
	return in, data
}

// What waits is sent as a chunk by splicing, while the stream takes little at a time.
func TestSplice(t *testing.T) {
	in, data := waiting(t, 1<<20)
	stream, guest := socketPair(t)
	defer stream.Close()
	defer guest.Close()
	guest.SetDeadline(time.Now().Add(within))
	stream.SetWriteBuffer(4 << 10)
	n := in.queued
	var sent sync.WaitGroup
	defer sent.Wait()
	sent.Go(func() {
		if ok, err := sendSpliced(sink{newOutlet(stream), true}, in); !ok || err != nil {
			t.Errorf("not spliced, %v", err)
		}
	})
	head := make([]byte, chunkHead)
	if _, err := io.ReadFull(guest, head); err != nil || int(binary.BigEndian.Uint32(head)) != n {
		t.Fatalf("a chunk of %x bytes, %v, want %x", head, err, n)
	}
	got := make([]byte, n)
	if _, err := io.ReadFull(guest, got); err != nil || !bytes.Equal(got, data[:n]) {
		t.Errorf("other bytes, or fewer, %v", err)
	}
	sent.Wait()
	if n := pipesInUse.Load(); n != 0 {
		t.Errorf("%d pipes are in use", n)
	}
}

// Where splicing is not possible or not worth it, nothing has been sent.
func TestNoSplice(t *testing.T) {
	in, _ := waiting(t, 1<<20)
	stream, guest := socketPair(t)
	defer stream.Close()
	defer guest.Close()
	other, _ := tcpPair(t)
	chunks := sink{newOutlet(stream), true}
	few := newInlet(other)
	few.queued = spliceFrom - 1
	for name, tt := range map[string]struct {
		out  sink
		in   source
		used int32
	}{
		"without chunks":       {sink{newOutlet(stream), false}, in, 0},
		"not to a unix socket": {sink{newOutlet(other), true}, in, 0},
		"of chunks":            {chunks, newChunked(guest, nil, guest), 0},
		"of little":            {chunks, few, 0},
		"without pipes":        {chunks, in, maxPipes},
	} {
		pipesInUse.Add(tt.used)
		if ok, err := sendSpliced(tt.out, tt.in); ok || err != nil {
			t.Errorf("%s: %t, %v", name, ok, err)
		}
		if n := pipesInUse.Add(-tt.used); n != 0 {
			t.Errorf("%s: %d pipes are in use", name, n)
		}
	}
	stream.Close()
	if b, err := io.ReadAll(guest); len(b) > 0 || err != nil {
		t.Errorf("%d bytes were sent, %v", len(b), err)
	}
}

// A stream that takes no more holds a pipe for as long as the connection lasts, and not longer, whoever ends it.
func TestStuckStream(t *testing.T) {
	for name, end := range map[string]func(client *net.TCPConn, guest *chunked, stop func()){
		"the guest": func(_ *net.TCPConn, guest *chunked, _ func()) { guest.Close() },
		"the host":  func(_ *net.TCPConn, _ *chunked, stop func()) { stop() },
	} {
		t.Run(name, func(t *testing.T) {
			client, guest, stop := relayed(t)
			var writing sync.WaitGroup
			defer writing.Wait()
			writing.Go(func() {
				for b := noise(1 << 20); ; {
					if _, err := client.Write(b); err != nil {
						if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
							t.Errorf("the client's end: %v", err)
						}
						return
					}
				}
			})
			eventually(t, "a pipe in use", func() bool { return pipesInUse.Load() == 1 })
			end(client, guest, stop)
			writing.Wait()
			stop()
			if n := pipesInUse.Load(); n != 0 {
				t.Errorf("%d pipes are in use", n)
			}
		})
	}
}

// Connections that nobody uses cost no blocks.
func TestIdleRelays(t *testing.T) {
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse
	}
	before := heap()
	const many = 50
	for range many {
		client, guest, _ := relayed(t)
		exchange := []io.ReadWriter{client, guest, client}
		for i, to := range exchange[:2] { // they have been used before
			io.WriteString(to, "x")
			if _, err := io.ReadFull(exchange[i+1], make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if after := heap(); after > before+many*blockSize/2 {
		t.Errorf("%d connections have %d KiB", many, (after-before)>>10)
	}
}

// Of a guest that lies about lengths the client hears what is true, and no end.
func TestLyingLengths(t *testing.T) {
	g := newDeviceGateway(t, ServerConfig{})
	c, _ := g.guest(nil)
	conns := make(chan net.Conn, 1)
	w := mustPublish(t, c, tcp(0), func(_ proxy.Header, conn net.Conn) { conns <- conn })
	for name, tt := range map[string]struct{ wire, want string }{
		"more than comes":      {"\x00\x00\x10\x00some", "some"},
		"more than there is":   {"\x00\x00\x00\x04some\x01\x00\x00\x01", "some"},
		"the most there could": {"\xff\xff\xff\xff", ""},
		"half a length":        {"\x00\x00\x00\x04some\x00\x00", "some"},
		"no end":               {"\x00\x00\x00\x04some", "some"},
	} {
		conn := dialTCP(t, fmt.Sprintf("127.0.0.1:%d", w.HostPort()))
		stream := (<-conns).(*chunked).Conn
		io.WriteString(stream, tt.wire[:min(8, len(tt.wire))])
		got := make([]byte, len(tt.want))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != tt.want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, tt.want)
		}
		// Not before the client has that: a reset overtakes what has not been read.
		io.WriteString(stream, tt.wire[min(8, len(tt.wire)):])
		stream.Close()
		if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: then %d, %v, want a reset", name, n, err)
		}
	}
}
