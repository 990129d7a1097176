package l2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

// plainSum is the Internet checksum as RFC 1071 writes it down.
func plainSum(b []byte, sum uint32) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
		sum = sum>>16 + sum&0xffff
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum>>16 + sum&0xffff)
}

func TestChecksum(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for n := range 300 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
			if n%3 == 0 {
				b[i] = 0xff // every addition carries
			}
		}
		if got, want := fold(sum(b, 6)), plainSum(b, 6); got != want {
			t.Errorf("%d bytes: got %#x, want %#x", n, got, want)
		}
	}
}

// segment is a TCP segment with n bytes of payload whose checksum has been left out, as a guest's kernel leaves it.
func segment(v6, tag bool, n, mss int) Frame {
	b := append(append(make([]byte, 0, 128), gatewayMAC[:]...), 0x5a, 0x94, 0xef, 0, 0, 1)
	if tag {
		b = binary.BigEndian.AppendUint16(b, etherVLAN)
		b = binary.BigEndian.AppendUint16(b, 5)
	}
	v := Virtio{Flags: NeedsCsum, GSOType: GSOTCPv4, GSOSize: uint16(mss), CsumOffset: tcpCsumOffset}
	var pseudo uint64
	if v6 {
		v.GSOType = GSOTCPv6
		b = binary.BigEndian.AppendUint16(b, etherIPv6)
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7], ip[8], ip[24] = 0x60, protoTCP, 64, 0xfd, 0xfd
		binary.BigEndian.PutUint16(ip[4:], uint16(32+n))
		pseudo = sum(ip[8:40], protoTCP+uint64(32+n))
		b = append(b, ip...)
	} else {
		b = binary.BigEndian.AppendUint16(b, etherIPv4)
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9], ip[12], ip[16] = 0x45, 64, protoTCP, 10, 10
		ip[4], ip[5] = 0xff, 0xff // the next ID is 0
		binary.BigEndian.PutUint16(ip[2:], uint16(52+n))
		binary.BigEndian.PutUint16(ip[10:], fold(sum(ip, 0)))
		pseudo = sum(ip[12:20], protoTCP+uint64(32+n))
		b = append(b, ip...)
	}
	v.CsumStart = uint16(len(b))
	tcp := make([]byte, 32)
	binary.BigEndian.PutUint32(tcp[4:], 0xfffffff0) // runs over
	tcp[12], tcp[13] = 8<<4, 0x10|tcpFIN|tcpPSH|tcpCWR
	binary.BigEndian.PutUint16(tcp[16:], ^fold(pseudo))
	b = append(b, tcp...)
	f := Frame{Virtio: v, Head: b}
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i * 7)
	}
	for len(data) > 0 { // in uneven pieces, one of them in Head
		k := min(len(data), 1+len(data)/3*2)
		if len(f.Tail) == 0 && f.Head != nil && len(f.Head) == int(v.CsumStart)+32 {
			f.Head = append(f.Head, data[:k]...)
		} else {
			f.Tail = append(f.Tail, data[:k], nil)
		}
		data = data[k:]
	}
	return f
}

// TestSegments takes what appendSegments makes apart and holds it against what was sent.
func TestSegments(t *testing.T) {
	for _, tt := range []struct {
		name    string
		v6, tag bool
		n, mss  int
		want    int
	}{
		{"v4", false, false, 60000, 1448, 42},
		{"v6", true, false, 60000, 1428, 43},
		{"tag", false, true, 3001, 1000, 4},
		{"tag v6", true, true, 3000, 1000, 3},
		{"one", false, false, 100, 1448, 1},
		{"nothing", false, false, 0, 1448, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := segment(tt.v6, tt.tag, tt.n, tt.mss)
			if err := f.check(); err != nil {
				t.Fatal(err)
			}
			wire := appendFrame(nil, QEMU, 0, &f)
			if need, longest := wireLen(QEMU, 0, &f); need != len(wire) || longest > int(f.Virtio.HdrLen)+tt.mss {
				t.Errorf("need %d bytes, longest %d; it is %d bytes", need, longest, len(wire))
			}
			s := splitter{framing: QEMU}
			frames, _, err := s.split(wire, make([]Frame, 0, 64))
			if err != nil || len(frames) != tt.want {
				t.Fatalf("%d segments, %v, want %d", len(frames), err, tt.want)
			}
			var data []byte
			for i := range frames {
				data = append(data, checkSegment(t, &f, &frames[i], i, i == len(frames)-1)...)
			}
			whole := f.appendTo(nil)[f.Virtio.HdrLen:]
			if !bytes.Equal(data, whole) {
				t.Error("the payload is not what was sent")
			}
		})
	}
}

// checkSegment checks the headers of segment i of f and returns its payload.
func checkSegment(t *testing.T, f, seg *Frame, i int, last bool) []byte {
	t.Helper()
	_, at := seg.layer3()
	ip, tcp := seg.Head[at:], seg.Head[f.Virtio.CsumStart:]
	pseudo := sum(nil, protoTCP+uint64(len(tcp)))
	if ip[0]>>4 == 4 {
		if got := binary.BigEndian.Uint16(ip[2:]); int(got) != len(ip) {
			t.Errorf("segment %d: total length %d of %d", i, got, len(ip))
		}
		if id := binary.BigEndian.Uint16(ip[4:]); id != 0xffff+uint16(i) {
			t.Errorf("segment %d: ID %#x", i, id)
		}
		if plainSum(ip[:20], 0) != 0 {
			t.Errorf("segment %d: wrong header checksum", i)
		}
		pseudo = sum(ip[12:20], pseudo)
	} else {
		if got := binary.BigEndian.Uint16(ip[4:]); int(got) != len(ip)-40 {
			t.Errorf("segment %d: payload length %d of %d", i, got, len(ip)-40)
		}
		pseudo = sum(ip[8:40], pseudo)
	}
	if plainSum(tcp, uint32(^fold(pseudo))) != 0 {
		t.Errorf("segment %d: wrong TCP checksum", i)
	}
	if got, want := binary.BigEndian.Uint32(tcp[4:]), uint32(0xfffffff0)+uint32(i)*uint32(f.Virtio.GSOSize); got != want {
		t.Errorf("segment %d: sequence number %d, want %d", i, got, want)
	}
	flags := byte(0x10)
	if i == 0 {
		flags |= tcpCWR
	}
	if last {
		flags |= tcpFIN | tcpPSH
	}
	if tcp[13] != flags {
		t.Errorf("segment %d: flags %#x, want %#x", i, tcp[13], flags)
	}
	return tcp[32:]
}

func TestChecksumOnly(t *testing.T) {
	f := segment(false, false, 100, 1448)
	f.Virtio.GSOType, f.Virtio.GSOSize = GSONone, 0
	if err := f.check(); err != nil {
		t.Fatal(err)
	}
	wire := appendFrame(nil, QEMU, 0, &f)
	done := Frame{Head: wire[4:]}
	tcp := done.Head[f.Virtio.CsumStart:]
	if plainSum(tcp, uint32(^fold(sum(done.Head[headerLen+12:][:8], protoTCP+uint64(len(tcp)))))) != 0 {
		t.Error("wrong TCP checksum")
	}
	if wire := appendFrame(nil, Usernet, Csum, &f); !bytes.Equal(wire[4+VirtioLen:], f.appendTo(nil)) {
		t.Error("a receiver that sums itself does not get the frame as it is")
	}
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(f *Frame)
		ok     bool
	}{
		{"as it is", func(*Frame) {}, true},
		{"with ECN", func(f *Frame) { f.Virtio.GSOType |= GSOECN }, true},
		{"flags of later versions", func(f *Frame) { f.Virtio.Flags |= 0x40 }, true},
		{"header length wrong, which nobody believes", func(f *Frame) { f.Virtio.HdrLen = 9999 }, true},
		{"no checksum wanted", func(f *Frame) { f.Virtio.Flags = 0 }, false},
		{"segments of one byte", func(f *Frame) { f.Virtio.GSOSize = 1 }, false},
		{"segments of nothing", func(f *Frame) { f.Virtio.GSOSize = 0 }, false},
		{"UDP fragments", func(f *Frame) { f.Virtio.GSOType = 3 }, false},
		{"unknown type", func(f *Frame) { f.Virtio.GSOType = 5 }, false},
		{"the other family", func(f *Frame) { f.Virtio.GSOType = GSOTCPv6 }, false},
		{"checksum elsewhere", func(f *Frame) { f.Virtio.CsumOffset = 6 }, false},
		{"TCP elsewhere", func(f *Frame) { f.Virtio.CsumStart += 4 }, false},
		{"TCP behind the end", func(f *Frame) { f.Virtio.CsumStart = 65535 }, false},
		{"UDP", func(f *Frame) { f.Head[headerLen+9] = protoUDP }, false},
		{"TCP header too short", func(f *Frame) { f.Head[headerLen+20+12] = 4 << 4 }, false},
		{"TCP header behind the end", func(f *Frame) { f.Head = f.Head[:headerLen+40] }, false},
		{"checksum only, behind the end", func(f *Frame) { f.Virtio.GSOType, f.Virtio.CsumStart = GSONone, uint16(len(f.Head)-17) }, false},
		{"checksum only, in the addresses", func(f *Frame) { f.Virtio.GSOType, f.Virtio.CsumStart = GSONone, 2 }, false},
		{"checksum only, at the end", func(f *Frame) { f.Virtio.GSOType, f.Virtio.CsumStart = GSONone, uint16(len(f.Head)-18) }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := segment(false, false, 3000, 1000)
			tt.change(&f)
			err := f.check()
			if tt.ok != (err == nil) || err != nil && !errors.Is(err, errVirtio) {
				t.Errorf("got %v, want ok %v", err, tt.ok)
			}
		})
	}
}

// FuzzFinish finishes frames with every header there is.
func FuzzFinish(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		s := segment(v6, v6, 5000, 1000)
		f.Add(appendFrame(nil, Usernet, AllOffload, &s), uint16(200))
	}
	f.Fuzz(func(t *testing.T, b []byte, head uint16) {
		s := splitter{framing: Usernet}
		frames, _, _ := s.split(b, make([]Frame, 0, 4))
		for i := range frames {
			f := &frames[i]
			// As the gateway has it: in parts.
			if k := max(int(head), headerLen); k < len(f.Head) {
				f.Head, f.Tail = f.Head[:k], [][]byte{f.Head[k:]}
			}
			if f.check() != nil {
				continue
			}
			for _, takes := range []Offload{0, Csum, AllOffload} {
				need, longest := wireLen(QEMU, takes, f)
				wire := appendFrame(nil, QEMU, takes, f)
				if len(wire) != need {
					t.Fatalf("%d bytes where %d were wanted", len(wire), need)
				}
				for r := wire; len(r) > 0; {
					n := int(binary.BigEndian.Uint32(r))
					if n > longest {
						t.Fatalf("frame of %d bytes where %d is the longest", n, longest)
					}
					r = r[4+n:]
				}
			}
		}
	})
}
