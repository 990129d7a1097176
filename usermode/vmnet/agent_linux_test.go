package vmnet

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/nettest/load"
	"github.com/usernet/usernet/usermode/l2"
)

// Machines are processes of their own, as those that drive loads are.
func init() {
	load.Init(map[string]func([]string) error{"machine": func(args []string) error { return runMachine(args[0]) }})
}

const tapName = "eth0"

// runMachine is a machine's network card: a TAP in the namespace that the process was started in, joined to the socket at descriptor 3.
func runMachine(framing string) error {
	c, err := net.FileConn(os.NewFile(3, "link"))
	if err != nil {
		return err
	}
	opts := l2.Options{Framing: l2.HyperKit}
	if framing == l2.Usernet.String() {
		opts = l2.Options{Framing: l2.Usernet, Takes: l2.AllOffload}
	}
	tap, err := openTAP(opts.Takes != 0)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	link := l2.Stream(c, opts)
	ended := make(chan error, 2)
	go func() { ended <- fromTAP(tap, link) }()
	go func() { ended <- toTAP(tap, link) }()
	return <-ended
}

func openTAP(offload bool) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(tapName)
	if err != nil {
		return nil, err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, l2.VirtioLen); err != nil {
		return nil, fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if offload {
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
			return nil, fmt.Errorf("TUNSETOFFLOAD: %w", err)
		}
	}
	return os.NewFile(uintptr(fd), tapName), nil
}

// fromTAP sends what the machine's kernel sends, as much at once as there is.
func fromTAP(tap *os.File, link *l2.Link) error {
	raw, err := tap.SyscallConn()
	if err != nil {
		return err
	}
	var bufs [32][]byte
	for i := range bufs {
		bufs[i] = make([]byte, l2.VirtioLen+l2.MaxFrame)
	}
	frames := make([]l2.Frame, 0, len(bufs))
	for {
		frames = frames[:0]
		bytes := 0
		err := raw.Read(func(fd uintptr) bool {
			for len(frames) < len(bufs) && bytes < 256<<10 {
				b := bufs[len(frames)]
				n, err := unix.Read(int(fd), b)
				if err != nil {
					break
				}
				bytes += n
				frames = append(frames, l2.Frame{Virtio: virtio(b), Head: b[l2.VirtioLen:n]})
			}
			return len(frames) > 0
		})
		if err != nil {
			return err
		}
		if _, err := link.Send(frames); err != nil {
			return err
		}
	}
}

func virtio(b []byte) l2.Virtio {
	ne := binary.NativeEndian
	return l2.Virtio{Flags: b[0], GSOType: b[1], HdrLen: ne.Uint16(b[2:]), GSOSize: ne.Uint16(b[4:]), CsumStart: ne.Uint16(b[6:]), CsumOffset: ne.Uint16(b[8:])}
}

func toTAP(tap *os.File, link *l2.Link) error {
	raw, err := tap.SyscallConn()
	if err != nil {
		return err
	}
	var hdr [l2.VirtioLen]byte
	for {
		frames, err := link.Receive()
		if err != nil {
			return err
		}
		err = raw.Write(func(fd uintptr) bool {
			for _, f := range frames {
				v, ne := f.Virtio, binary.NativeEndian
				hdr[0], hdr[1] = v.Flags, v.GSOType
				for i, n := range []uint16{v.HdrLen, v.GSOSize, v.CsumStart, v.CsumOffset} {
					ne.PutUint16(hdr[2+2*i:], n)
				}
				unix.Writev(int(fd), append([][]byte{hdr[:], f.Head}, f.Tail...))
			}
			return true
		})
		if err != nil {
			return err
		}
	}
}
