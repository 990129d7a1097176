package agent

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/usermode/l2"
)

// probe finds out what the TAP finishes itself: by one long frame of each family, since there are kernels that offer it and
// then refuse such frames with EINVAL.
func (t *tap) probe(cfg Config) error {
	if !t.vnet {
		cfg.Log.Info("tap has no virtio headers", "interface", cfg.Interface)
		return nil
	}
	err := t.leave(l2.AllOffload)
	for _, frame := range [][]byte{probe4(t.mac), probe6(t.mac)} {
		if err != nil {
			break
		}
		// EIO: the TAP is not up yet, and cannot be tried.
		if _, werr := t.file.Write(frame); werr != nil && !errors.Is(werr, unix.EIO) {
			err = fmt.Errorf("long frame: %w", werr)
		}
	}
	if err == nil {
		t.takes = l2.AllOffload
		return nil
	}
	cfg.Log.Info("offload is not used", "interface", cfg.Interface, "reason", err)
	return t.leave(0)
}

const (
	probeMSS     = 1000
	probePayload = 3 * probeMSS
	tcpHeaderLen = 20
)

// probe4 is a TCP packet of three segments that the kernel's IPv4 input drops, because its header has no checksum.
func probe4(to l2.MAC) []byte {
	const ipLen = 20
	b, ip := probeFrame(to, unix.ETH_P_IP, l2.GSOTCPv4, ipLen)
	ip[0] = 4<<4 | ipLen/4
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	ip[8] = 1 // hop limit
	ip[9] = unix.IPPROTO_TCP
	return b
}

// probe6 likewise, which IPv6 input drops because it comes from a multicast address (RFC 4291, section 2.7).
func probe6(to l2.MAC) []byte {
	const ipLen = 40
	b, ip := probeFrame(to, unix.ETH_P_IPV6, l2.GSOTCPv6, ipLen)
	ip[0] = 6 << 4
	binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-ipLen))
	ip[6] = unix.IPPROTO_TCP
	ip[7] = 1 // hop limit
	ip[8] = 0xff
	return b
}

// probeFrame is a frame for the TAP with room for an IP packet, whose header has ipLen bytes.
func probeFrame(to l2.MAC, etherType uint16, gso uint8, ipLen int) (frame, packet []byte) {
	frame = make([]byte, l2.VirtioLen+headerLen+ipLen+tcpHeaderLen+probePayload)
	encodeVirtio(frame, l2.Virtio{
		Flags:      l2.NeedsCsum,
		GSOType:    gso,
		HdrLen:     uint16(headerLen + ipLen + tcpHeaderLen),
		GSOSize:    probeMSS,
		CsumStart:  uint16(headerLen + ipLen),
		CsumOffset: 16, // in the TCP header
	})
	ether := frame[l2.VirtioLen:]
	copy(ether, to[:])
	copy(ether[6:], []byte{2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(ether[12:], etherType)
	packet = ether[headerLen:]
	packet[ipLen+12] = tcpHeaderLen / 4 << 4 // data offset
	return frame, packet
}
