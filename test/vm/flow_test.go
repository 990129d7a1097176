package vm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet/test/engine"
)

// flow is a stream from the outside to an echo server, as fast as it goes, and back.
type flow struct {
	addr   string
	conn   *net.TCPConn
	enough chan struct{} // closed: nothing more is to be sent
	moved  chan struct{} // 1 deep: bytes went, or came
	ended  chan struct{} // closed when all is back, or will never be
	err    error         // when ended is closed

	sent, got atomic.Int64
	began     time.Time
	last      atomic.Int64 // when bytes went or came, in nanoseconds since began
	pause     atomic.Int64 // the longest between bytes that came, likewise
}

// flow starts a stream to an echo server. It goes with the test, and with its time.
func (r *rig) flow(addr string) *flow {
	r.Helper()
	conn, err := engine.Dial(r.Context(), r.outside(), "tcp", addr)
	r.must(err)
	for _, set := range []func(int) error{conn.(*net.TCPConn).SetReadBuffer, conn.(*net.TCPConn).SetWriteBuffer} {
		r.must(set(256 << 10)) // what is under way at the end takes its time
	}
	f := &flow{
		addr: addr, conn: conn.(*net.TCPConn), began: time.Now(),
		enough: make(chan struct{}), moved: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	stop := context.AfterFunc(r.Context(), func() { conn.Close() })
	go f.run()
	r.Cleanup(func() {
		stop()
		conn.Close()
		<-f.ended
	})
	return f
}

func (f *flow) run() {
	defer close(f.ended)
	failed := make(chan error, 1)
	go func() { failed <- f.send() }()
	err := f.receive()
	f.conn.Close()
	f.err = errors.Join(err, <-failed)
	if sent, got := f.sent.Load(), f.got.Load(); f.err == nil && sent != got {
		f.err = fmt.Errorf("of %d bytes, %d came back", sent, got)
	}
}

func (f *flow) send() error {
	from := rand.NewChaCha8([32]byte{})
	for b := make([]byte, 16<<10); ; {
		select {
		case <-f.enough:
			return f.conn.CloseWrite()
		default:
		}
		from.Read(b)
		n, err := f.conn.Write(b)
		f.sent.Add(int64(n))
		f.note()
		if err != nil {
			return err
		}
	}
}

func (f *flow) receive() error {
	like := rand.NewChaCha8([32]byte{})
	b, want := make([]byte, 64<<10), make([]byte, 64<<10)
	for came := f.began; ; {
		n, err := f.conn.Read(b)
		f.pause.Store(max(f.pause.Load(), int64(time.Since(came))))
		came = time.Now()
		like.Read(want[:n])
		if !bytes.Equal(b[:n], want[:n]) {
			return fmt.Errorf("what comes back after %d bytes is not what was sent", f.got.Load())
		}
		f.got.Add(int64(n))
		f.note()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (f *flow) note() {
	f.last.Store(int64(time.Since(f.began)))
	select {
	case f.moved <- struct{}{}:
	default:
	}
}

// passes waits until so many bytes more have come back, and tells how long that took.
func (r *rig) passes(f *flow, n int64) time.Duration {
	r.Helper()
	start := time.Now()
	late := time.NewTimer(patience)
	defer late.Stop()
	for end := f.got.Load() + n; f.got.Load() < end; {
		select {
		case <-f.moved:
		case <-f.ended:
			r.Fatalf("the stream to %s: %v", f.addr, f.err)
		case <-late.C:
			r.Fatalf("the stream to %s is stuck after %d bytes", f.addr, f.got.Load())
		}
	}
	return time.Since(start)
}

// stuck waits until nothing has gone or come for a second.
func (r *rig) stuck(f *flow) {
	r.Helper()
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		rest := time.Second - (time.Since(f.began) - time.Duration(f.last.Load()))
		if rest <= 0 {
			return
		}
		select {
		case <-time.After(rest):
		case <-f.ended:
			r.Fatalf("the stream to %s: %v", f.addr, f.err)
		case <-late.C:
			r.Fatalf("the stream to %s goes on, after %d bytes", f.addr, f.got.Load())
		}
	}
}

// completes ends a stream and checks that all of it came back.
func (r *rig) completes(f *flow) {
	r.Helper()
	close(f.enough)
	select {
	case <-f.ended:
		if f.err != nil {
			r.Errorf("the stream to %s: %v", f.addr, f.err)
		}
	case <-time.After(patience):
		r.Fatalf("the stream to %s does not end: of %d bytes, %d are back", f.addr, f.sent.Load(), f.got.Load())
	}
}
