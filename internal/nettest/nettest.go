// Package nettest gives tests a machine of their own: a fresh network and mount namespace for the whole test binary,
// more namespaces for pretend containers, veth pairs between them, and checks that nothing was left behind. For tests
// only.
package nettest

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
)

const inside = "USERNET_NETTEST_INSIDE"

// Main is the body of a package's TestMain. It runs the test binary again in a network and mount namespace of its
// own (and, for an ordinary user, a user namespace), with loopback up, so that every goroutine of every test
// sees a clean pretend host. Call it as os.Exit(nettest.Main(m)).
func Main(m *testing.M) int {
	if os.Getenv(inside) != "" {
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, "nettest:", err)
			return 1
		}
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	runtime.LockOSThread() // Pdeathsig is the thread's
	if err := cmd.Run(); err != nil {
		if cmd.ProcessState != nil {
			return cmd.ProcessState.ExitCode()
		}
		fmt.Fprintln(os.Stderr, "nettest: run in a namespace:", err)
		return 1
	}
	return 0
}

func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// A sysfs of this network namespace; xtables takes its lock in /run.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// NewNS makes a network namespace with loopback up, pinned below the test's directory; it goes with the test.
func NewNS(t testing.TB) *netns.NS {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	ns, err := netns.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	Handle(t, ns, func(h *netlink.Handle) error { return up(h, "lo") })
	return ns
}

// Handle runs f with a netlink handle in ns.
func Handle(t testing.TB, ns *netns.NS, f func(h *netlink.Handle) error) {
	t.Helper()
	err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return f(h)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Veth joins the test's own namespace and ns by a veth pair and brings both ends up with the addresses given. It goes
// with ns.
func Veth(t testing.TB, here string, hereAddr netip.Prefix, ns *netns.NS, there string, thereAddr netip.Prefix) {
	t.Helper()
	la := netlink.NewLinkAttrs()
	la.Name = here
	veth := &netlink.Veth{LinkAttrs: la, PeerName: there, PeerNamespace: netlink.NsFd(ns.Fd())}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatalf("add veth %s: %v", here, err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(here); err == nil {
			netlink.LinkDel(l)
		}
	})
	if err := Addr(h, here, hereAddr); err != nil {
		t.Fatal(err)
	}
	Handle(t, ns, func(h *netlink.Handle) error { return Addr(h, there, thereAddr) })
}

// Addr gives link an address (when a is valid) without duplicate address detection and brings it up.
func Addr(h *netlink.Handle, link string, a netip.Prefix) error {
	l, err := h.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find %s: %w", link, err)
	}
	if a.IsValid() {
		addr, err := netlink.ParseAddr(a.String())
		if err != nil {
			return err
		}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", a, link, err)
		}
	}
	return h.LinkSetUp(l)
}

func up(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	return h.LinkSetUp(l)
}

// NoLeaks fails the test if, when it ends, the namespace has links or the process open files that it did not have
// when NoLeaks was called. Call it first, so that it runs after the test's own cleanup. (Goroutines: go.uber.org/goleak.)
func NoLeaks(t testing.TB) {
	t.Helper()
	links, files := linkNames(t), openFiles(t)
	t.Cleanup(func() {
		for _, l := range linkNames(t) {
			if !slices.Contains(links, l) {
				t.Errorf("leaked link %s", l)
			}
		}
		// Package net keeps the pipes of splice(2) in a pool that the garbage collector empties, in two rounds and with
		// finalizers.
		after := openFiles(t)
		for deadline := time.Now().Add(2 * time.Second); len(after) > len(files) && time.Now().Before(deadline); after = openFiles(t) {
			runtime.GC()
		}
		if len(after) > len(files) {
			t.Errorf("leaked %d descriptors:\nbefore %v\nafter  %v", len(after)-len(files), files, after)
		}
	})
}

func linkNames(t testing.TB) []string {
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names
}

// openFiles lists what the process has open, without the runtime's own poller.
func openFiles(t testing.TB) []string {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.Contains(target, "eventpoll") || strings.Contains(target, "eventfd") {
			continue
		}
		files = append(files, target)
	}
	return files
}
