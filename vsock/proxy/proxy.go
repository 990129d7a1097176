// Package proxy writes and reads the header of the PROXY protocol, version 2: the first bytes of a forwarded connection,
// which say whose it is and where it was going. It reads exactly the header, so that the connection is raw behind it,
// and wraps nothing. Version 1, the line of text, is not understood.
//
// The specification is HAProxy's doc/proxy-protocol.txt.
package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
)

// ErrNoHeader says that the stream does not begin with a header of version 2.
var ErrNoHeader = errors.New("no PROXY v2 header")

// Header says what a stream carries. Its zero value is the header LOCAL: the sender speaks for itself.
type Header struct {
	Datagram bool           // UDP, not TCP
	Client   netip.AddrPort // whose the connection is; zero: unknown, or the sender's own
	Target   netip.AddrPort // where the client dialled; zero with Client
}

// signature is what no other protocol begins with.
const signature = "\r\n\r\n\x00\r\nQUIT\n"

// The 13th byte: version and command.
const (
	local = 0x20
	proxy = 0x21
)

// The 14th byte: family and transport.
const (
	inet   = 0x10
	inet6  = 0x20
	files  = 0x30 // AF_UNIX
	stream = 0x01
	dgram  = 0x02
)

const (
	fixed = len(signature) + 4 // up to the length
	size4 = 4 + 4 + 2 + 2
	size6 = 16 + 16 + 2 + 2
	sizeU = 108 + 108

	// most is how many bytes of addresses and extensions Read takes. The specification has 536 bytes in mind for all of it;
	// what certificates and the like can add is nothing that we ask for.
	most = 4096
)

// Append appends the header to b. Both addresses must be there or none. If just one of them is IPv4, it is sent as
// mapped into IPv6, and Read turns it back; zones are not sent.
func (h Header) Append(b []byte) ([]byte, error) {
	b = append(b, signature...)
	if h == (Header{}) {
		return append(b, local, 0, 0, 0), nil
	}
	if !h.Client.IsValid() || !h.Target.IsValid() {
		return nil, fmt.Errorf("PROXY header from %s to %s: an address is missing", h.Client, h.Target)
	}
	transport := byte(stream)
	if h.Datagram {
		transport = dgram
	}
	client, target := h.Client.Addr().Unmap(), h.Target.Addr().Unmap()
	if client.Is4() && target.Is4() {
		b = append(b, proxy, inet|transport, 0, size4)
		b = append(b, client.AsSlice()...)
		b = append(b, target.AsSlice()...)
	} else {
		c, t := client.As16(), target.As16()
		b = append(b, proxy, inet6|transport, 0, size6)
		b = append(b, c[:]...)
		b = append(b, t[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, h.Client.Port())
	return binary.BigEndian.AppendUint16(b, h.Target.Port()), nil
}

// Write sends the header, in one write.
func (h Header) Write(w io.Writer) error {
	b, err := h.Append(make([]byte, 0, fixed+size6))
	if err != nil {
		return err
	}
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("write PROXY header: %w", err)
	}
	return nil
}

// Read reads a header and not a byte more. It skips extensions, once their lengths have turned out to be right, and takes what
// comes from families other than IPv4 and IPv6 as unknown. The error is io.EOF if the stream ends before the
// first byte, and wraps ErrNoHeader if it begins with something else. Set a deadline before: the sender may be silent.
func Read(r io.Reader) (Header, error) {
	h, err := read(r)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("read PROXY header: %w", err)
	}
	return h, err
}

func read(r io.Reader) (Header, error) {
	var b [fixed]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Header{}, err
	}
	if string(b[:len(signature)]) != signature {
		return Header{}, fmt.Errorf("%w: the stream begins with %q", ErrNoHeader, b[:])
	}
	command, family := b[12], b[13]
	if command != local && command != proxy {
		return Header{}, fmt.Errorf("version and command %#02x are unknown", command)
	}
	n := int(binary.BigEndian.Uint16(b[14:]))
	if n > most {
		return Header{}, fmt.Errorf("%d bytes of addresses and extensions are more than %d", n, most)
	}
	rest := make([]byte, n)
	if _, err := io.ReadFull(r, rest); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Header{}, err
	}
	if command == local {
		return Header{}, nil // whatever is in it: section 2.2
	}
	return decode(family, rest)
}

// decode reads the addresses of the command PROXY and looks at the extensions behind them.
func decode(family byte, b []byte) (Header, error) {
	size, err := addressSize(family)
	if err != nil {
		return Header{}, err
	}
	if len(b) < size {
		return Header{}, fmt.Errorf("%d bytes are too few for the addresses of family %#02x", len(b), family)
	}
	if family != 0 { // UNSPEC: what follows means nothing
		if err := checkExtensions(b[size:]); err != nil {
			return Header{}, err
		}
	}
	if size != size4 && size != size6 {
		return Header{}, nil
	}
	n := (size - 4) / 2
	client, _ := netip.AddrFromSlice(b[:n])
	target, _ := netip.AddrFromSlice(b[n : 2*n])
	return Header{
		Datagram: family&0xf == dgram,
		Client:   netip.AddrPortFrom(client.Unmap(), binary.BigEndian.Uint16(b[2*n:])),
		Target:   netip.AddrPortFrom(target.Unmap(), binary.BigEndian.Uint16(b[2*n+2:])),
	}, nil
}

func addressSize(family byte) (int, error) {
	switch family {
	case 0:
		return 0, nil
	case inet | stream, inet | dgram:
		return size4, nil
	case inet6 | stream, inet6 | dgram:
		return size6, nil
	case files | stream, files | dgram:
		return sizeU, nil
	}
	return 0, fmt.Errorf("family and transport %#02x are unknown", family)
}

// checkExtensions goes through type, length and value of each.
func checkExtensions(b []byte) error {
	for len(b) > 0 {
		if len(b) < 3 {
			return fmt.Errorf("an extension of %d bytes has no room for its length", len(b))
		}
		n := int(binary.BigEndian.Uint16(b[1:]))
		if n > len(b)-3 {
			return fmt.Errorf("extension %#02x has %d bytes, of which %d are there", b[0], n, len(b)-3)
		}
		b = b[3+n:]
	}
	return nil
}
