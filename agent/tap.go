package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/usermode/l2"
)

const (
	maxName = unix.IFNAMSIZ - 1
	minMTU  = 576               // RFC 1122, section 3.3.2: what every host takes
	maxMTU  = 65535 - headerLen // the driver's own limit

	headerLen = 14 // of Ethernet

	// txQueueLen is the number of frames that the TAP holds for us. The driver's 500 are less than a window of TCP if no frame is
	// longer than 1500 bytes, and what finds no place is lost.
	txQueueLen = 2000
)

// errTAP says that the TAP cannot be used.
var errTAP = errors.New("tap")

// tap is an open TAP.
type tap struct {
	file  *os.File
	raw   syscall.RawConn
	link  netlink.Link
	mac   l2.MAC
	vnet  bool       // frames have a struct virtio_net_hdr_v1 before them
	takes l2.Offload // what it finishes itself
}

// openTAP makes or takes the TAP and configures it, without its carrier, as far as that is not DHCP's. The way back is pushed.
func openTAP(cfg Config, back *undo.List) (*tap, error) {
	_, err := netlink.LinkByName(cfg.Interface)
	if err != nil && (cfg.Preexisting || !gone(err)) {
		return nil, fmt.Errorf("find %s: %w", cfg.Interface, err)
	}
	t, err := attach(cfg.Interface)
	if err != nil {
		return nil, err
	}
	back.Push(t.file.Close)
	if err := t.carrier(false); err != nil {
		cfg.Log.Debug("tap keeps its carrier", "interface", cfg.Interface, "reason", err)
	}
	if t.link, err = netlink.LinkByName(cfg.Interface); err != nil {
		return nil, fmt.Errorf("find %s: %w", cfg.Interface, err)
	}
	was := t.link.Attrs()
	t.mac = l2.MAC(was.HardwareAddr)
	if cfg.MAC != (l2.MAC{}) && cfg.MAC != t.mac {
		if err := change(back, netlink.LinkSetHardwareAddr, t.link, cfg.MAC[:], was.HardwareAddr); err != nil {
			return nil, fmt.Errorf("set address of %s to %s: %w", cfg.Interface, cfg.MAC, err)
		}
		t.mac = cfg.MAC
	}
	back.Push(func() error { return ifThere(netlink.LinkSetMTU(t.link, was.MTU)) }) // DHCP may change it
	if cfg.MTU != 0 {
		if err := netlink.LinkSetMTU(t.link, cfg.MTU); err != nil {
			return nil, fmt.Errorf("set mtu of %s to %d: %w", cfg.Interface, cfg.MTU, err)
		}
	}
	if cfg.Preexisting {
		return t, t.probe(cfg)
	}
	if err := change(back, netlink.LinkSetTxQLen, t.link, txQueueLen, was.TxQLen); err != nil {
		return nil, fmt.Errorf("set queue of %s: %w", cfg.Interface, err)
	}
	if err := acceptRA(cfg.Interface, back); err != nil {
		cfg.Log.Warn("there may be no IPv6", "error", err) // in a container, where /proc/sys is read-only
	}
	if was.Flags&unix.IFF_UP == 0 {
		back.Push(func() error { return ifThere(netlink.LinkSetDown(t.link)) })
	}
	if err := netlink.LinkSetUp(t.link); err != nil {
		return nil, fmt.Errorf("set %s up: %w", cfg.Interface, err)
	}
	return t, t.probe(cfg)
}

// change sets something of a link and pushes how to set it back.
func change[V any](back *undo.List, set func(netlink.Link, V) error, link netlink.Link, to, was V) error {
	if err := set(link, to); err != nil {
		return err
	}
	back.Push(func() error { return ifThere(set(link, was)) })
	return nil
}

// gone tells whether err says that there is no such link.
func gone(err error) bool {
	return errors.As(err, &netlink.LinkNotFoundError{}) || errors.Is(err, unix.ENODEV)
}

// ifThere is err, unless it is that the link has gone.
func ifThere(err error) error {
	if gone(err) {
		return nil
	}
	return err
}

// acceptRA has the kernel take router advertisements on an interface even though the machine forwards, as one with
// containers does.
func acceptRA(iface string, back *undo.List) error {
	path := "/proc/sys/net/ipv6/conf/" + iface + "/accept_ra"
	was, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without IPv6
	}
	if err == nil {
		err = os.WriteFile(path, []byte("2"), 0)
	}
	if err != nil {
		return fmt.Errorf("take router advertisements on %s: %w", iface, err)
	}
	back.Push(func() error {
		err := os.WriteFile(path, []byte(strings.TrimSpace(string(was))), 0)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	return nil
}

// attach opens the TAP of a name; the driver makes it if there is none.
func attach(name string) (*tap, error) {
	t, err := attachAs(name, unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	if errors.Is(err, unix.EINVAL) {
		t, err = attachAs(name, unix.IFF_TAP|unix.IFF_NO_PI)
	}
	return t, err
}

func attachAs(name string, flags uint16) (_ *tap, err error) {
	// The raw call: os.Open would show the file to the runtime's poller before TUNSETIFF, when it cannot be polled yet.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun (the kernel's tun driver is needed): %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("name %s: %w", name, err)
	}
	req.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, fmt.Errorf("attach to tap %s: %w", name, err)
	}
	t := &tap{vnet: flags&unix.IFF_VNET_HDR != 0}
	if t.vnet {
		if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, l2.VirtioLen); err != nil {
			return nil, fmt.Errorf("set header size of %s: %w", name, err)
		}
	}
	t.file = os.NewFile(uintptr(fd), "/dev/net/tun")
	t.raw, err = t.file.SyscallConn()
	return t, err
}

// control runs an ioctl.
func (t *tap) control(f func(fd int) error) (err error) {
	if cerr := t.raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// carrier tells the machine whether there is somebody at the other end (Linux 5.0).
func (t *tap) carrier(on bool) error {
	value := 0
	if on {
		value = 1
	}
	return os.NewSyscallError("TUNSETCARRIER", t.control(func(fd int) error { return unix.IoctlSetPointerInt(fd, unix.TUNSETCARRIER, value) }))
}

// leave tells the kernel what it may leave undone in the frames that it sends.
func (t *tap) leave(o l2.Offload) error {
	if !t.vnet {
		return nil
	}
	flags := 0
	for bit, flag := range map[l2.Offload]int{l2.Csum: unix.TUN_F_CSUM, l2.TSO4: unix.TUN_F_TSO4, l2.TSO6: unix.TUN_F_TSO6} {
		if o&bit != 0 {
			flags |= flag
		}
	}
	return os.NewSyscallError("TUNSETOFFLOAD", t.control(func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, flags) }))
}

// begin lets the TAP speak with a gateway that takes what the kernel leaves undone. What the machine sent to the one before is lost.
func (t *tap) begin(takes l2.Offload) error {
	if err := t.file.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("%w: %w", errTAP, err)
	}
	if err := t.leave(takes); err != nil {
		return fmt.Errorf("%w: %w", errTAP, err)
	}
	if err := t.drain(); err != nil {
		return err
	}
	t.carrier(true) // where it does not exist, it is always there
	return nil
}

// end is the reverse of begin.
func (t *tap) end() { t.carrier(false) }

// interrupt ends reading and writing until begin.
func (t *tap) interrupt() { t.file.SetDeadline(time.Unix(1, 0)) }

// drain forgets what the TAP holds.
func (t *tap) drain() error {
	var buf [1]byte
	return t.control(func(fd int) error {
		for {
			_, err := unix.Read(fd, buf[:]) // the rest of a frame is cut off
			switch {
			case errors.Is(err, unix.EAGAIN):
				return nil
			case err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EINVAL):
				return fmt.Errorf("%w: read: %w", errTAP, err)
			}
		}
	})
}
