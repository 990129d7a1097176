package l2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

var gatewayMAC = MAC{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd}

// guestMAC is the address of guest i.
func guestMAC(i int) MAC { return MAC{0x5a, 0x94, 0xef, 0, byte(i >> 8), byte(i)} }

var broadcast = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// frame is an Ethernet frame of n bytes, of an EtherType for experiments, with a number in it.
func frame(dst, src MAC, n int, number uint32) []byte {
	b := make([]byte, max(n, headerLen+4))
	copy(b[0:], dst[:])
	copy(b[6:], src[:])
	binary.BigEndian.PutUint16(b[12:], 0x88b5)
	binary.BigEndian.PutUint32(b[14:], number)
	for i := headerLen + 4; i < len(b); i++ {
		b[i] = byte(i)
	}
	return b[:n]
}

var streams = []Framing{HyperKit, QEMU, Usernet}

// TestWireForm holds the bytes of a frame against what the peers' protocols say.
func TestWireForm(t *testing.T) {
	f := Frame{Head: frame(guestMAC(1), guestMAC(2), 60, 7)}
	for _, tt := range []struct {
		framing Framing
		prefix  []byte
	}{
		{HyperKit, []byte{60, 0}},
		{QEMU, []byte{0, 0, 0, 60}},
		{Usernet, []byte{0, 0, 0, 72, 1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0}},
	} {
		t.Run(tt.framing.String(), func(t *testing.T) {
			f.Virtio = Virtio{}
			if tt.framing == Usernet {
				f.Virtio = Virtio{Flags: NeedsCsum, CsumStart: 34, CsumOffset: 16}
			}
			got := appendFrame(nil, tt.framing, AllOffload, &f)
			if want := append(slices.Clone(tt.prefix), f.Head...); !bytes.Equal(got, want) {
				t.Errorf("got  %x\nwant %x", got, want)
			}
			s := splitter{framing: tt.framing}
			frames, used, err := s.split(got, make([]Frame, 0, 2))
			if err != nil || used != len(got) || len(frames) != 1 {
				t.Fatalf("%d frames of %d bytes, %v", len(frames), used, err)
			}
			if frames[0].Virtio != f.Virtio || !bytes.Equal(frames[0].Head, f.Head) {
				t.Errorf("got %+v, want %+v", frames[0], f)
			}
		})
	}
}

// raw is n bytes that say that they are n.
func raw(fr Framing, n int) []byte {
	b := fr.appendPrefix(nil, n, Virtio{})
	return append(b, make([]byte, n)...)
}

// TestSplitBounds has frames of every wrong length between two good ones.
func TestSplitBounds(t *testing.T) {
	good := Frame{Head: frame(guestMAC(1), guestMAC(2), 14, 0)}
	for _, fr := range streams {
		t.Run(fr.String(), func(t *testing.T) {
			for _, n := range []int{0, 1, 13, MaxFrame + 1, 128 << 10, meant} {
				if fr == HyperKit && n > 65535 {
					continue
				}
				wire := appendFrame(nil, fr, 0, &good)
				wire = append(append(wire, raw(fr, n)...), wire...)
				r := newStreamReader(bytes.NewReader(wire), Options{Framing: fr})
				var got int
				for {
					frames, err := r.receive()
					got += len(frames)
					if err == io.EOF {
						break
					}
					if err != nil {
						t.Fatalf("a frame of %d bytes: %v", n, err)
					}
				}
				if got != 2 || r.dropped() != 1 {
					t.Errorf("a frame of %d bytes: got %d frames, %d dropped, want 2 and 1", n, got, r.dropped())
				}
			}
		})
	}
}

func TestOutOfStep(t *testing.T) {
	good := Frame{Head: frame(guestMAC(1), guestMAC(2), 60, 0)}
	for _, tt := range []struct {
		name    string
		framing Framing
		tail    []byte
		want    error
	}{
		{"longer than anybody means", QEMU, binary.BigEndian.AppendUint32(nil, meant+1), ErrOutOfStep},
		{"text", QEMU, []byte("GET / HTTP/1.1\r\n"), ErrOutOfStep},
		{"no room for the header", Usernet, append(binary.BigEndian.AppendUint32(nil, 11), make([]byte, 12)...), ErrOutOfStep},
		{"ends in a length", HyperKit, []byte{60}, io.ErrUnexpectedEOF},
		{"ends in a frame", QEMU, []byte{0, 0, 0, 60, 1, 2, 3}, io.ErrUnexpectedEOF},
		{"ends in a giant", QEMU, []byte{0, 2, 0, 0, 1, 2, 3}, io.ErrUnexpectedEOF},
		{"ends", QEMU, nil, io.EOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newStreamReader(bytes.NewReader(append(appendFrame(nil, tt.framing, 0, &good), tt.tail...)), Options{Framing: tt.framing})
			if frames, err := r.receive(); err != nil || len(frames) != 1 {
				t.Fatalf("%d frames, %v: the good one is lost", len(frames), err)
			}
			for range 2 { // it stays
				if frames, err := r.receive(); len(frames) != 0 || !errors.Is(err, tt.want) {
					t.Errorf("got %d frames, %v, want %v", len(frames), err, tt.want)
				}
			}
		})
	}
}

// pieces reads b in pieces of random lengths.
type pieces struct {
	b    []byte
	rand *rand.Rand
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.b[:min(1+p.rand.IntN(3000), len(p.b))])
	p.b = p.b[n:]
	return n, nil
}

// FuzzStream reads what a guest may send, in pieces and as one: both must give the same frames and the same end.
func FuzzStream(f *testing.F) {
	good := Frame{Head: frame(guestMAC(1), guestMAC(2), 60, 0)}
	for i, fr := range streams {
		wire := appendFrame(nil, fr, 0, &good)
		f.Add(uint8(i), uint64(1), wire)
		f.Add(uint8(i), uint64(2), slices.Concat(wire, raw(fr, 5), wire, fr.appendPrefix(nil, 128<<10, Virtio{}), wire))
	}
	f.Add(uint8(1), uint64(3), []byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, framing uint8, seed uint64, b []byte) {
		opts := Options{Framing: streams[int(framing)%len(streams)]}
		read := func(r io.Reader, opts Options) (all []byte, dropped uint64, err error) {
			s := newStreamReader(r, opts)
			for {
				frames, err := s.receive()
				if err != nil {
					return all, s.dropped(), err
				}
				if len(frames) == 0 {
					t.Fatal("no frames and no error")
				}
				for i := range frames {
					f := &frames[i]
					if f.Len() < headerLen || f.Len() > MaxFrame || f.check() != nil {
						t.Fatalf("frame of %d bytes, %+v", f.Len(), f.Virtio)
					}
					all = appendFrame(all, Usernet, AllOffload, f)
				}
			}
		}
		all, dropped, err := read(bytes.NewReader(nil), Options{Framing: opts.Framing, Early: b})
		all2, dropped2, err2 := read(&pieces{b, rand.New(rand.NewPCG(seed, 0))}, opts)
		if !bytes.Equal(all, all2) || dropped != dropped2 || err.Error() != err2.Error() {
			t.Errorf("as one: %d bytes, %d dropped, %v; in pieces: %d, %d, %v", len(all), dropped, err, len(all2), dropped2, err2)
		}
	})
}

func TestMAC(t *testing.T) {
	m, err := ParseMAC("5A-94-ef-e4-0c-dd")
	if err != nil || m != gatewayMAC || m.String() != "5a:94:ef:e4:0c:dd" {
		t.Errorf("got %s, %v", m, err)
	}
	for _, bad := range []string{"", "5a:94:ef:e4:0c", "02:00:5e:10:00:00:00:01", strings.Repeat("z", 17)} {
		if m, err := ParseMAC(bad); err == nil {
			t.Errorf("%q is %s", bad, m)
		}
	}
}
