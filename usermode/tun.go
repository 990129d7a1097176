package usermode

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	tunFlags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR

	// Offload of UDP segmentation stays off: kernels have corrupted such packets.
	tunOffloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
)

// attachTUN attaches to the TUN device of the calling thread's namespace, making it where it does not exist. The
// device outlives the process: while nobody is attached, the containers' routes stand and their SYNs are lost and
// repeated, instead of failing at once with "network is unreachable". The file is in non-blocking mode and has no
// deadlines. EBUSY: another process is attached.
func attachTUN(h *netlink.Handle) (*os.File, error) {
	f, err := setTUN()
	if err == nil || errors.Is(err, unix.EBUSY) {
		return f, err
	}
	// What bears the name is of another kind: a TAP, or with several queues.
	link, lerr := h.LinkByName(uplink)
	if lerr != nil {
		return nil, err
	}
	if err := h.LinkDel(link); err != nil {
		return nil, fmt.Errorf("delete unfitting %s: %w", uplink, err)
	}
	return setTUN()
}

// setTUN opens the TUN driver and makes or takes the device.
func setTUN() (_ *os.File, err error) {
	// The raw call: os.Open would show the file to the poller before TUNSETIFF, when it cannot be polled yet.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun (the kernel's tun driver is needed): %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	req, err := unix.NewIfreq(uplink)
	if err != nil {
		return nil, err
	}
	req.SetUint16(tunFlags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, fmt.Errorf("attach to %s: %w", uplink, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, virtioHdrLen); err != nil {
		return nil, fmt.Errorf("set header size of %s: %w", uplink, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return nil, fmt.Errorf("make %s persistent: %w", uplink, err)
	}
	return tunFile(fd), nil
}

// tunFile is the file of a TUN device's descriptor, in non-blocking mode. The runtime's poller leaves alone what is
// blocking when the file is made; it would have a thread look up at every packet, which our own poller waits for.
func tunFile(fd int) *os.File {
	unix.SetNonblock(fd, false)
	f := os.NewFile(uintptr(fd), "/dev/net/tun")
	unix.SetNonblock(fd, true)
	return f
}

// negotiateOffload asks the kernel for segmentation and checksum offload on the TUN device, which must be up, and
// reports whether it works.
func (f *fabric) negotiateOffload() bool {
	err := errors.New("it is switched off")
	if !f.cfg.NoOffload {
		err = probeOffload(f.tun)
	}
	if err == nil {
		return true
	}
	f.cfg.Log.Info("segmentation offload is not used", "device", uplink, "reason", err)
	if err := setOffload(f.tun, 0); err != nil {
		f.cfg.Log.Warn("segmentation offload stays on", "device", uplink, "reason", err)
	}
	return false
}

// probeOffload switches offload on and writes one large packet of each family, since there are kernels that accept
// the flags and then refuse such packets with EINVAL (Linux 6.6.44, and some of NAS vendors).
func probeOffload(tun *os.File) error {
	if err := setOffload(tun, tunOffloads); err != nil {
		return err
	}
	for _, packet := range [][]byte{probe4(), probe6()} {
		if _, err := tun.Write(packet); err != nil {
			return fmt.Errorf("large packet: %w", err)
		}
	}
	return nil
}

func setOffload(tun *os.File, flags int) error {
	rc, err := tun.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := rc.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, flags) }); cerr != nil {
		return cerr
	}
	return os.NewSyscallError("TUNSETOFFLOAD", err)
}

const (
	probeMSS     = 1000
	probePayload = 3 * probeMSS
	tcpHdrLen    = 20
)

// probe4 is a TCP packet of three segments that the kernel's IPv4 input drops, because its header has no checksum.
func probe4() []byte {
	const ipLen = 20
	b := probeTCP(unix.VIRTIO_NET_HDR_GSO_TCPV4, ipLen)
	ip := b[virtioHdrLen:]
	ip[0] = 4<<4 | ipLen/4
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	ip[8] = 1 // hop limit
	ip[9] = unix.IPPROTO_TCP
	return b
}

// probe6 likewise, which IPv6 input drops because it comes from a multicast address (RFC 4291, section 2.7).
func probe6() []byte {
	const ipLen = 40
	b := probeTCP(unix.VIRTIO_NET_HDR_GSO_TCPV6, ipLen)
	ip := b[virtioHdrLen:]
	ip[0] = 6 << 4
	binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-ipLen))
	ip[6] = unix.IPPROTO_TCP
	ip[7] = 1 // hop limit
	ip[8] = 0xff
	return b
}

// probeTCP is a packet for the TUN device with room for an IP header of ipLen bytes.
func probeTCP(gsoType uint8, ipLen int) []byte {
	b := make([]byte, virtioHdrLen+ipLen+tcpHdrLen+probePayload)
	b[virtioHdrLen+ipLen+12] = tcpHdrLen / 4 << 4 // data offset
	virtioHdr{
		flags:      unix.VIRTIO_NET_HDR_F_NEEDS_CSUM,
		gsoType:    gsoType,
		hdrLen:     uint16(ipLen + tcpHdrLen),
		gsoSize:    probeMSS,
		csumStart:  uint16(ipLen),
		csumOffset: 16, // in the TCP header
	}.encode(b)
	return b
}
