// Package l2 carries Ethernet frames between virtual machines and a gateway: a Link is the wire to one machine, in
// whatever form its hypervisor speaks, and a Switch joins the links of many. What the gateway does with the frames for it, the
// package does not know.
//
// # Framings
//
//	HyperKit  a stream; each frame behind its length, 16 bits, little endian. Also gvproxy's /connect, gvforwarder and stdio;
//	          HyperKit itself begins with a handshake (HandshakeVPNKit)
//	QEMU      a stream; each frame behind its length, 32 bits, big endian (-netdev stream, -netdev socket)
//	Bare      a packet is a frame: SOCK_SEQPACKET (BESS), SOCK_DGRAM (vfkit, krunkit, -netdev dgram; see AwaitPeer)
//	Usernet   a stream; 32 bits of length, big endian, of all that follows; a struct virtio_net_hdr_v1 of 12 bytes, little
//	          endian (virtio 1.2, 5.1.6); the frame, up to 64 KiB of TCP in one and with its checksum left out, where the other
//	          end has said that it takes such (Offload)
//
// A frame that is too short or too long to be one is dropped and counted, and the next one is read. A length that nobody can
// have meant ends the link with ErrOutOfStep: whatever follows would be taken for lengths as well.
//
// # Whose an address is
//
// A machine's address is where it was seen first, as long as that port runs: nobody gets another one's frames by sending from its
// address. But a machine may come back by a new connection before anybody has noticed that its old one is dead, and is to be heard
// at once. So a port may take an address from one that began before it, if that one has been silent
// since the newer one began: a dead connection is, a machine that is there says something sooner or later. Where it has
// spoken since, it must have been silent for a second: what a dead connection had in its buffers may be read late.
//
// The earlier holder, while its port runs, gets a copy of what is sent to the address: a machine that is there will answer. As soon as it
// sends from the address it has that back, whoever took it must wait until it is silent for longer each time (a second at first,
// a minute at most), and beginning anew does not help. So a thief gets what is sent to a machine that says nothing at all, until the
// machine answers; and what it costs to move an address to and fro is one change of a table, at a rate that falls.
//
// An address that a port was given (PortConfig.MACs) is never taken.
//
// # How two ends agree on Usernet
//
// gvforwarder writes "POST /connect HTTP/1.1" and then frames, HyperKit's way; gvproxy answers nothing, sends frames too. There is
// no place for an answer in that, so the question is a request before it, on the same connection and to a path of its own:
//
//	agent    POST /connect/usernet HTTP/1.1        gateway  HTTP/1.1 101 Switching Protocols
//	         Connection: Upgrade                            Connection: Upgrade
//	         Upgrade: usernet/1                             Upgrade: usernet/1
//	         Usernet-Offload: csum, tso4, tso6              Usernet-Offload: csum, tso4, tso6
//
// Each end names what it takes; frames follow the empty line. Any other status is that of a server which does not know the path, gvproxy's 404:
// the agent then asks for /connect on the same connection, as gvforwarder would. A gvforwarder never
// asks for the path, so it is served as ever. The agent's part is Negotiate, the gateway's Connect.
package l2

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
)

// MAC is an Ethernet address. Unlike a net.HardwareAddr it can be compared.
type MAC [6]byte

// ParseMAC reads the usual forms of an address of 48 bits.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil {
		return MAC{}, err
	}
	if len(hw) != len(MAC{}) {
		return MAC{}, fmt.Errorf("address %s: %d bytes, want %d", s, len(hw), len(MAC{}))
	}
	return MAC(hw), nil
}

// String has six pairs of hex digits with colons, lower case.
func (m MAC) String() string {
	text, _ := m.MarshalText()
	return string(text)
}

// MarshalText makes a MAC a key or a value in JSON.
func (m MAC) MarshalText() ([]byte, error) {
	b := make([]byte, 0, 3*len(m))
	for i, c := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = hex.AppendEncode(b, []byte{c})
	}
	return b, nil
}

// group tells whether m is a group's address, broadcast included.
func (m MAC) group() bool { return m[0]&1 != 0 }

const (
	headerLen = 14 // destination, source, EtherType
	vlanLen   = 4  // an 802.1Q tag behind the source
)

// MaxFrame is the length of the longest frame: an IP packet of 65535 bytes, a tag, a header.
const MaxFrame = 65535 + headerLen + vlanLen

// A Frame is an Ethernet frame without its checksum. It is not owned by whoever gets it: who hands it out says how long its
// memory is valid.
type Frame struct {
	Virtio Virtio
	Head   []byte   // the frame's beginning, or all of it; at least the Ethernet header, with a Virtio all headers to TCP's
	Tail   [][]byte // what follows
}

// Len is the frame's length in bytes.
func (f *Frame) Len() int {
	n := len(f.Head)
	for _, t := range f.Tail {
		n += len(t)
	}
	return n
}

func (f *Frame) dst() MAC { return MAC(f.Head[0:6]) }
func (f *Frame) src() MAC { return MAC(f.Head[6:12]) }

// layer3 returns the EtherType, looked for behind a tag too, and where what it names begins.
func (f *Frame) layer3() (etherType uint16, offset int) {
	h := f.Head
	etherType, offset = uint16(h[12])<<8|uint16(h[13]), headerLen
	if etherType == etherVLAN && len(h) >= headerLen+vlanLen {
		etherType, offset = uint16(h[16])<<8|uint16(h[17]), headerLen+vlanLen
	}
	return etherType, offset
}

const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherVLAN = 0x8100
	etherIPv6 = 0x86dd
)

// appendTo appends the frame's bytes to b.
func (f *Frame) appendTo(b []byte) []byte {
	b = append(b, f.Head...)
	for _, t := range f.Tail {
		b = append(b, t...)
	}
	return b
}

// ErrOutOfStep says that what should have been a frame's length is not one.
var ErrOutOfStep = errors.New("stream is out of step")
