package proxy

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pires/go-proxyproto"
)

func header(client, target string, datagram bool) Header {
	return Header{Client: netip.MustParseAddrPort(client), Target: netip.MustParseAddrPort(target), Datagram: datagram}
}

const sign = "0d0a0d0a000d0a515549540a"

// The header on the wire, byte by byte as the specification has it.
var wire = []struct {
	name string
	h    Header
	hex  string
}{
	{"local", Header{}, sign + "20 00 0000"},
	{"tcp4", header("192.0.2.1:1025", "198.51.100.2:80", false), sign + "21 11 000c c0000201 c6336402 0401 0050"},
	{"udp4", header("192.0.2.1:1025", "198.51.100.2:53", true), sign + "21 12 000c c0000201 c6336402 0401 0035"},
	{"tcp6", header("[2001:db8::1]:65535", "[2001:db8::2]:443", false),
		sign + "21 21 0024 20010db8000000000000000000000001 20010db8000000000000000000000002 ffff 01bb"},
	{"udp6", header("[2001:db8::1]:1", "[2001:db8::2]:0", true),
		sign + "21 22 0024 20010db8000000000000000000000001 20010db8000000000000000000000002 0001 0000"},
	{"families mixed", header("192.0.2.1:1025", "[2001:db8::2]:443", false),
		sign + "21 21 0024 00000000000000000000ffffc0000201 20010db8000000000000000000000002 0401 01bb"},
}

func raw(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var byValue = cmpopts.EquateComparable(netip.AddrPort{})

func TestWire(t *testing.T) {
	for _, tt := range wire {
		t.Run(tt.name, func(t *testing.T) {
			var b bytes.Buffer
			if err := tt.h.Write(&b); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(raw(t, tt.hex), b.Bytes()); diff != "" {
				t.Error("-want +got\n" + diff)
			}
			b.WriteString("and what follows")
			got, err := Read(iotest.OneByteReader(&b))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.h, got, byValue); diff != "" {
				t.Error("-want +got\n" + diff)
			}
			if b.String() != "and what follows" {
				t.Errorf("behind the header: %q", b.String())
			}
		})
	}
}

// TestAppendNormal: addresses that mean the same are the same on the wire.
func TestAppendNormal(t *testing.T) {
	want, err := header("192.0.2.1:1", "192.0.2.2:2", false).Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := header("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2", false).Append(nil)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("mapped addresses: %x, %v, want %x", got, err, want)
	}
	zone, err := header("[fe80::1%eth0]:1", "[fe80::2%eth0]:2", false).Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := Read(bytes.NewReader(zone)); err != nil || h != header("[fe80::1]:1", "[fe80::2]:2", false) {
		t.Errorf("with a zone: %v, %v", h, err)
	}
}

func TestAppendErrors(t *testing.T) {
	whole := header("192.0.2.1:1", "192.0.2.2:2", false)
	for _, h := range []Header{{Client: whole.Client}, {Target: whole.Target}, {Datagram: true}} {
		var b bytes.Buffer
		if err := h.Write(&b); err == nil || b.Len() > 0 {
			t.Errorf("%+v: error %v, %d bytes written", h, err, b.Len())
		}
	}
}

func TestRead(t *testing.T) {
	client := header("192.0.2.1:1025", "198.51.100.2:80", false)
	const four = "c0000201 c6336402 0401 0050"
	for _, tt := range []struct {
		name, hex string
		want      Header
	}{
		{"extensions", sign + "21 11 0013" + four + "04 0000 ee 0001 ff", client},
		{"local with addresses", sign + "20 11 000c" + four, Header{}},
		{"local with anything", sign + "20 ff 0002 0102", Header{}},
		{"unspecified", sign + "21 00 0000", Header{}},
		{"unspecified with anything", sign + "21 00 0002 0102", Header{}},
		{"unix", sign + "21 31 00d8" + strings.Repeat("00", 216), Header{}},
		{"as much as is taken", sign + "21 11 1000" + four + "04 0ff1" + strings.Repeat("00", 0xff1), client},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := bytes.NewReader(append(raw(t, tt.hex), "rest"...))
			got, err := Read(r)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, byValue); diff != "" {
				t.Error("-want +got\n" + diff)
			}
			if r.Len() != len("rest") {
				t.Errorf("%d bytes are left, want %d", r.Len(), len("rest"))
			}
		})
	}
}

func TestReadErrors(t *testing.T) {
	const four = "c0000201 c6336402 0401 0050"
	for _, tt := range []struct{ name, hex, want string }{
		{"cut in the signature", "0d0a0d0a", "unexpected EOF"},
		{"cut before the addresses", sign + "21 11 000c", "unexpected EOF"},
		{"cut in the addresses", sign + "21 11 000c c000", "unexpected EOF"},
		{"version 1", hex.EncodeToString([]byte("PROXY TCP4 192.0.2.1 198.51.100.2 1025 80\r\n")), "no PROXY v2 header"},
		{"one byte of the signature", strings.Replace(sign, "51", "71", 1) + "21 11 000c" + four, "no PROXY v2 header"},
		{"version 3", sign + "31 11 000c" + four, "version and command 0x31"},
		{"another command", sign + "22 11 000c" + four, "version and command 0x22"},
		{"another family", sign + "21 41 000c" + four, "family and transport 0x41"},
		{"another transport", sign + "21 13 000c" + four, "family and transport 0x13"},
		{"no transport", sign + "21 10 000c" + four, "family and transport 0x10"},
		{"too few for IPv4", sign + "21 11 000b" + four, "11 bytes are too few"},
		{"too few for IPv6", sign + "21 21 000c" + four, "12 bytes are too few"},
		{"too much", sign + "21 11 1001" + four + strings.Repeat("00", 5000), "4097 bytes"},
		{"the most", sign + "21 11 ffff" + four, "65535 bytes"},
		{"an extension without length", sign + "21 11 000e" + four + "0400", "no room for its length"},
		{"an extension longer than all", sign + "21 11 000f" + four + "040001", "has 1 bytes, of which 0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, err := Read(bytes.NewReader(raw(t, tt.hex)))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if h != (Header{}) {
				t.Errorf("a header beside the error: %+v", h)
			}
		})
	}
	if _, err := Read(strings.NewReader("")); err != io.EOF {
		t.Errorf("nothing at all: %v, want io.EOF", err)
	}
	if _, err := Read(strings.NewReader("GET / HTTP/1.1\r\n")); !errors.Is(err, ErrNoHeader) {
		t.Errorf("HTTP: %v, want ErrNoHeader", err)
	}
}

// TestOther exchanges headers with another implementation.
func TestOther(t *testing.T) {
	for _, tt := range wire {
		if tt.name == "families mixed" {
			continue // theirs keeps the mapped address
		}
		t.Run(tt.name, func(t *testing.T) {
			b, err := tt.h.Append(nil)
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(b)))
			if err != nil {
				t.Fatal(err)
			}
			if tt.h != (Header{}) && (theirs.SourceAddr.String() != tt.h.Client.String() || theirs.DestinationAddr.String() != tt.h.Target.String()) {
				t.Errorf("they read %s to %s", theirs.SourceAddr, theirs.DestinationAddr)
			}
			if err := theirs.SetTLVs([]proxyproto.TLV{{Type: proxyproto.PP2_TYPE_NOOP, Value: []byte("padding")}}); err != nil {
				t.Fatal(err)
			}
			if b, err = theirs.Format(); err != nil {
				t.Fatal(err)
			}
			ours, err := Read(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.h, ours, byValue); diff != "" {
				t.Error("-want +got\n" + diff)
			}
		})
	}
}

func FuzzRead(f *testing.F) {
	for _, tt := range wire {
		f.Add(raw(f, tt.hex))
	}
	f.Add(raw(f, sign+"21 11 0013 c0000201 c6336402 0401 0050 04 0000 ee 0001 ff"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := bytes.NewReader(stream)
		h, err := Read(r)
		read := len(stream) - r.Len()
		if read > fixed+most {
			t.Fatalf("%d bytes were read", read)
		}
		if err != nil {
			return
		}
		if want := fixed + int(stream[14])<<8 + int(stream[15]); read != want {
			t.Fatalf("%d bytes were read of a header of %d", read, want)
		}
		b, err := h.Append(nil)
		if err != nil {
			t.Fatalf("%+v was read and cannot be written: %v", h, err)
		}
		again, err := Read(bytes.NewReader(b))
		if err != nil || again != h {
			t.Fatalf("%+v was read, and after writing %+v, %v", h, again, err)
		}
	})
}
