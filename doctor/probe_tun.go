package doctor

import (
	"encoding/binary"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	tunName      = "doctor0"
	virtioHdrLen = 10 // of struct virtio_net_hdr, linux/virtio_net.h
)

// openTUN makes a TUN device with virtio headers that goes when the file is closed.
func openTUN() (_ *os.File, err error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	req, err := unix.NewIfreq(tunName)
	if err != nil {
		return nil, err
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, fmt.Errorf("make a TUN device: %w", err)
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

// largePackets switches segmentation offload on and writes a packet of three segments, because there are kernels that
// accept the one and refuse the other.
func largePackets(dev *os.File) error {
	link, err := netlink.LinkByName(tunName)
	if err != nil {
		return fmt.Errorf("find %s: %w", tunName, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", tunName, err)
	}
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	if _, err := dev.Write(largePacket()); err != nil {
		return fmt.Errorf("write a large packet: %w", err)
	}
	return nil
}

// largePacket is a TCP packet over IPv4 (RFC 791, RFC 9293) of three segments behind its virtio header. Its IP header
// has no checksum, so that the kernel throws it away when it has taken it.
func largePacket() []byte {
	const ipLen, tcpLen, mss = 20, 20, 1000
	b := make([]byte, virtioHdrLen+ipLen+tcpLen+3*mss)
	b[0] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	b[1] = unix.VIRTIO_NET_HDR_GSO_TCPV4
	for i, v := range []uint16{ipLen + tcpLen, mss, ipLen, 16} { // headers, segment, where to sum from, and to
		binary.NativeEndian.PutUint16(b[2+2*i:], v)
	}
	ip := b[virtioHdrLen:]
	ip[0] = 4<<4 | ipLen/4
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	ip[8], ip[9] = 1, unix.IPPROTO_TCP
	ip[ipLen+12] = tcpLen / 4 << 4
	return b
}
