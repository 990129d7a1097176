package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/vsock"
)

// vsock is the kernel's way between a virtual machine and its host. It only matters where there are machines, so it is
// never a fault. Nothing is dialled.
func (m *machine) vsock(context.Context) (finding, bool) {
	var parts []string
	switch cid, err := localCID(); {
	case errors.Is(err, fs.ErrNotExist):
		parts = append(parts, "this kernel has no vsock at the moment")
	case errors.Is(err, fs.ErrPermission):
		parts = append(parts, "there, but only root may ask for this machine's address")
	case err != nil:
		parts = append(parts, fmt.Sprintf("there, but does not tell this machine's address (%v)", err))
	case cid == unix.VMADDR_CID_HOST || cid == unix.VMADDR_CID_LOCAL || cid == unix.VMADDR_CID_ANY:
		parts = append(parts, "there; this machine has no address as a virtual machine")
	default:
		parts = append(parts, fmt.Sprintf("there; this is a virtual machine with the address %d", cid))
	}
	if m.exists("/dev/vhost-vsock") {
		parts = append(parts, "it can give its own virtual machines one (vhost-vsock)")
	}
	if m.exists("/sys/module/vsock_loopback") {
		parts = append(parts, "loopback works")
	}
	return say(Info, "%s. It matters for virtual machines only.", strings.Join(parts, "; "))
}

// localCID asks for the address that this machine has as a guest.
func localCID() (uint32, error) {
	fd, err := unix.Open("/dev/vsock", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: "/dev/vsock", Err: err}
	}
	defer unix.Close(fd)
	return unix.IoctlGetUint32(fd, unix.IOCTL_VM_SOCKETS_GET_LOCAL_CID)
}

// hostGateway dials the gateway of the configuration. What the daemon was told on its command line is not known here.
func (m *machine) hostGateway(ctx context.Context) (finding, bool) {
	url := m.cfg.Daemon.HostGateway
	if url == "" {
		return silence()
	}
	a, err := vsock.Parse(url)
	if err == nil {
		var c net.Conn
		if c, err = vsock.Dial(ctx, a); err == nil {
			c.Close()
			return say(OK, "it listens at %s.", url)
		}
	}
	return say(Warning, "containers with published ports will not start: %v. usernet gateway should run on this machine's host.", plain(err))
}
