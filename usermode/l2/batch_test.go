//go:build unix

package l2

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// recorder is a sender that keeps what it is given.
type recorder struct{ wire bytes.Buffer }

func (r *recorder) write(b []byte) error {
	_, err := r.wire.Write(b)
	return err
}

func (r *recorder) try(b []byte) (int, error) { return r.wire.Write(b) }

// TestBatch: a batch has on the wire what Send has, whatever the frames are.
func TestBatch(t *testing.T) {
	plain := func(n int) Frame { return Frame{Head: frame(gatewayMAC, guestMAC(1), n, 7)} }
	whole := func(f Frame) Frame { return Frame{Virtio: f.Virtio, Head: f.appendTo(nil)} }
	frames := []Frame{
		plain(60), plain(1514), plain(1515), plain(MaxFrame),
		{Head: make([]byte, headerLen-1)},
		whole(segment(false, false, 60000, 1448)), whole(segment(true, true, 3000, 1428)),
		{Virtio: Virtio{Flags: NeedsCsum, CsumStart: 2000, CsumOffset: 6}, Head: plain(60).Head}, // it does not fit
		{Virtio: Virtio{Flags: NeedsCsum, CsumStart: 34, CsumOffset: 6}, Head: plain(60).Head},
		plain(61),
	}
	for _, opts := range []Options{
		{Framing: HyperKit, MTU: 1500}, {Framing: QEMU, MTU: 65520}, {Framing: Bare},
		{Framing: Usernet, Takes: AllOffload, MTU: 1500}, {Framing: Usernet, MTU: 1500}, {Framing: Usernet, Takes: Csum},
	} {
		t.Run(fmt.Sprintf("%s/%d/%v", opts.Framing, opts.MTU, opts.Takes), func(t *testing.T) {
			var sent, batched recorder
			var left int // by Send
			for _, f := range frames {
				if len(f.Head) < headerLen { // which Send is not given
					continue
				}
				n, err := newLink(nil, opts, nil, &sent).Send([]Frame{{Virtio: f.Virtio, Head: bytes.Clone(f.Head)}})
				if err != nil {
					t.Fatal(err)
				}
				left += n
			}
			l := newLink(nil, opts, nil, &batched)
			b := l.NewBatch(100_000)
			added := 0
			for _, f := range frames {
				room := b.Next()
				if room == nil {
					if err := l.SendBatch(b); err != nil || b.Len() != 0 {
						t.Fatalf("%d are left, %v", b.Len(), err)
					}
					room = b.Next()
				}
				if b.Add(copy(room, f.Head), f.Virtio) {
					added++
				}
			}
			if err := l.SendBatch(b); err != nil {
				t.Fatal(err)
			}
			if want := len(frames) - 1 - left; added != want {
				t.Errorf("added %d, Send sent %d", added, want)
			}
			if !bytes.Equal(batched.wire.Bytes(), sent.wire.Bytes()) {
				t.Errorf("%d bytes, Send has %d and others", batched.wire.Len(), sent.wire.Len())
			}
		})
	}
}

// TestBatchIsFull: there is an end to what Next has room for.
func TestBatchIsFull(t *testing.T) {
	l := newLink(nil, Options{Framing: QEMU}, nil, &recorder{})
	for _, tt := range []struct{ size, frame, want int }{{1000, 400, 3}, {1000, MaxFrame, 1}, {1 << 20, 60, maxBatch}} {
		b := l.NewBatch(tt.size)
		n := 0
		for room := b.Next(); room != nil; room = b.Next() {
			if len(room) < MaxFrame {
				t.Fatalf("room for %d bytes", len(room))
			}
			b.Add(copy(room, frame(gatewayMAC, guestMAC(1), tt.frame, 1)), Virtio{})
			n++
		}
		if n != tt.want {
			t.Errorf("%d bytes take %d frames of %d bytes, want %d", tt.size, n, tt.frame, tt.want)
		}
	}
}

// TestDirect has long frames, which are written from where they are, go with short ones to a machine that takes less than a frame at
// a time: all come, in order, and whole.
func TestDirect(t *testing.T) {
	for _, tt := range []struct {
		framing Framing
		buffer  int // bytes that wait for the machine
	}{{HyperKit, 8 << 10}, {Usernet, 8 << 10}, {Usernet, 200_000}} {
		t.Run(fmt.Sprint(tt.framing, tt.buffer), func(t *testing.T) {
			opts := Options{Framing: tt.framing, Takes: AllOffload}
			b := newBed(t, Config{})
			host, mine := socketpair(t, unix.SOCK_STREAM)
			link := Stream(host, opts)
			host.SetWriteBuffer(tt.buffer)
			p, ended := b.run(link, PortConfig{})
			g := &guest{Link: Stream(mine, opts), t: t, conn: mine, port: p, ended: ended, mac: guestMAC(1)}
			g.say(gatewayMAC, 1)
			b.until(func() bool { return b.sw.PortOf(g.mac) != nil })
			const count = 300
			go func() {
				for i := range count {
					long := frame(g.mac, gatewayMAC, 100+i*211%65000, uint32(i))
					cut := min(100, len(long))
					f := []Frame{{Head: long[:cut], Tail: [][]byte{long[cut : cut+(len(long)-cut)/2], nil, long[cut+(len(long)-cut)/2:]}}}
					for b.sw.Send(f) > 0 {
						b.sw.AwaitRoom(g.mac, nil)
					}
				}
			}()
			for i := range count {
				got, want := g.next(), frame(g.mac, gatewayMAC, 100+i*211%65000, uint32(i))
				if !bytes.Equal(got.appendTo(nil), want) {
					t.Fatalf("frame %d: got number %d, %d bytes, want %d", i, numberOf(got), got.Len(), len(want))
				}
			}
		})
	}
}

// wrapped is a connection that reads in a way of its own.
type wrapped struct {
	*net.UnixConn
	r io.Reader
}

func (w wrapped) Read(b []byte) (int, error) { return w.r.Read(b) }

// TestWrappedConnection: what only embeds a socket is asked itself.
func TestWrappedConnection(t *testing.T) {
	host, _ := socketpair(t, unix.SOCK_STREAM)
	wire := (&Frame{Head: frame(gatewayMAC, guestMAC(1), 60, 5)}).appendTo(QEMU.appendPrefix(nil, 60, Virtio{}))
	frames, err := Stream(wrapped{host, bytes.NewReader(wire)}, Options{Framing: QEMU}).Receive()
	if err != nil || len(frames) != 1 || numberOf(frames[0]) != 5 {
		t.Errorf("received %d frames, %v", len(frames), err)
	}
}
