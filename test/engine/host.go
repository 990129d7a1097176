package engine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
)

// The pretend host's addresses on its uplink eth0, and the other end of the wire, which is its default route.
var (
	HostAddr   = netip.MustParsePrefix("10.200.0.2/24")
	HostAddr2  = netip.MustParsePrefix("10.200.0.3/24") // a second address of the same link
	HostAddr6  = netip.MustParsePrefix("fd00:200::2/64")
	RouterAddr = netip.MustParsePrefix("10.200.0.1/24")
	Router6    = netip.MustParsePrefix("fd00:200::1/64")
)

// Host is a pretend host: a network, mount and process namespace, held by a process of its own, with an uplink to a
// pretend internet.
type Host struct {
	Dir string // a directory with the same path in and outside the pretend host

	cgroup  string
	holder  *exec.Cmd
	leash   io.Closer // the holder ends when it is closed
	mnt     *os.File
	pid     *os.File
	ns      *netns.NS
	outside *Outside
	usernet *process // nil until StartUsernet
	user    *user    // whom its networks are for; nil: root
}

func newHost(root string) (_ *Host, err error) {
	dir, err := os.MkdirTemp("", "usernet-test-")
	if err != nil {
		return nil, err
	}
	h := &Host{Dir: dir, cgroup: filepath.Base(dir)}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}
	if err := h.hold(root); err != nil {
		return nil, err
	}
	if err := h.open(); err != nil {
		return nil, err
	}
	if h.outside, err = newOutside(); err != nil {
		return nil, err
	}
	if err := h.uplink(); err != nil {
		return nil, err
	}
	return h, h.outside.serve()
}

// hold starts the holder and waits until it has its mounts.
func (h *Host) hold(root string) error {
	text, err := json.Marshal(holding{
		Root: root, Dir: h.Dir, Cgroup: h.cgroup,
		Resolv: fmt.Sprintf("nameserver %s\n", DNSAddr),
	})
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"usernet-test-holder"}
	cmd.Env = append(os.Environ(), holderEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Setpgid:    true, // an interrupt at the terminal is for the maker, who then lets go of the leash
	}
	leash, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start holder: %w", err)
	}
	h.holder, h.leash = cmd, leash
	line, _ := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		return fmt.Errorf("holder: %s", strings.TrimSpace(line))
	}
	return nil
}

func (h *Host) open() (err error) {
	if h.ns, err = netns.Open(h.proc("ns/net")); err != nil {
		return err
	}
	if h.mnt, err = os.Open(h.proc("ns/mnt")); err != nil {
		return err
	}
	h.pid, err = os.Open(h.proc("ns/pid"))
	return err
}

// proc is a path below the holder's entry in /proc.
func (h *Host) proc(name string) string {
	return fmt.Sprintf("/proc/%d/%s", h.holder.Process.Pid, name)
}

// Path is how the maker of the pretend host reaches a path in it. It does not follow absolute symbolic links.
func (h *Host) Path(path string) string { return h.proc("root" + path) }

// Do runs f on a thread in the pretend host's network namespace.
func (h *Host) Do(f func() error) error { return h.ns.Do(f) }

// NS is the pretend host's network namespace.
func (h *Host) NS() *netns.NS { return h.ns }

// Outside is the pretend internet.
func (h *Host) Outside() *Outside { return h.outside }

// uplink joins the pretend host and the outside by a wire.
func (h *Host) uplink() error {
	err := h.outside.ns.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = "wire"
		wire := &netlink.Veth{LinkAttrs: la, PeerName: "eth0", PeerNamespace: netlink.NsFd(h.ns.Fd())}
		if err := netlink.LinkAdd(wire); err != nil {
			return fmt.Errorf("add the uplink: %w", err)
		}
		return configure("wire", RouterAddr, Router6)
	})
	if err != nil {
		return err
	}
	return h.ns.Do(func() error {
		if err := configure("lo"); err != nil {
			return err
		}
		if err := configure("eth0", HostAddr, HostAddr2, HostAddr6); err != nil {
			return err
		}
		for _, gw := range []netip.Prefix{RouterAddr, Router6} {
			if err := netlink.RouteAdd(&netlink.Route{Gw: gw.Addr().AsSlice()}); err != nil {
				return fmt.Errorf("add default route by %s: %w", gw.Addr(), err)
			}
		}
		return nil
	})
}

// configure gives a link of the calling thread's namespace addresses and brings it up.
func configure(name string, addrs ...netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	for _, a := range addrs {
		ipnet := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
		addr := &netlink.Addr{IPNet: ipnet}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", a, name, err)
		}
	}
	return netlink.LinkSetUp(l)
}

// Command prepares a command of the pretend host; Start starts it. A name without a slash is looked for in the pretend
// host's own /usr/sbin and /usr/bin.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	path := name
	if !strings.Contains(name, "/") {
		path = "/usr/bin/" + name
		if _, err := os.Lstat(h.Path("/usr/sbin/" + name)); err == nil {
			path = "/usr/sbin/" + name
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Args[0] = name
	cmd.Dir = "/"
	cmd.Env = []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8",
		"DOCKER_HOST=unix://" + DockerSocket, "USERNET_CONTROL_SOCKET=" + ControlSocket,
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Start starts a command that Command prepared.
func (h *Host) Start(cmd *exec.Cmd) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with this goroutine
		done <- func() error {
			if err := h.enter(); err != nil {
				return fmt.Errorf("enter the pretend host: %w", err)
			}
			return cmd.Start()
		}()
	}()
	return <-done
}

func (h *Host) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(h.ns.Fd(), unix.CLONE_NEWNET); err != nil {
		return err
	}
	if err := unix.Setns(int(h.pid.Fd()), unix.CLONE_NEWPID); err != nil {
		return err
	}
	return unix.Setns(int(h.mnt.Fd()), unix.CLONE_NEWNS)
}

// DialUnix is the DialContext of a client for a unix socket in the pretend host.
func (h *Host) DialUnix(path string) func(ctx context.Context, _, _ string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", h.Path(path))
	}
}

// Close ends every process in the pretend host and removes what is left of it.
func (h *Host) Close() error {
	var err error
	if h.leash != nil {
		h.leash.Close()
		if werr := h.holder.Wait(); werr != nil {
			err = fmt.Errorf("holder: %w", werr)
		}
	}
	if h.outside != nil {
		h.outside.close()
	}
	if h.ns != nil {
		h.ns.Close()
	}
	for _, f := range []*os.File{h.mnt, h.pid} {
		if f != nil {
			f.Close()
		}
	}
	return errors.Join(err, os.RemoveAll(h.Dir))
}
