package main

import (
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

// The disk is never written to. What is below a container's root cannot be an overlay over an overlay, so Docker has its own tmpfs.
var table = []mount{
	{"devtmpfs", "/dev", "devtmpfs", 0, ""},
	{"/dev/vda", "/disk", "ext4", unix.MS_RDONLY, ""},
	{"tmpfs", "/memory", "tmpfs", 0, "mode=755,size=90%"},
	{"overlay", "/root", "overlay", 0, "lowerdir=/disk,upperdir=/memory/upper,workdir=/memory/work"},
	{"/payload", "/root/payload", "", unix.MS_BIND, ""},
	{"proc", "/root/proc", "proc", 0, ""},
	{"sysfs", "/root/sys", "sysfs", 0, ""},
	{"cgroup2", "/root/sys/fs/cgroup", "cgroup2", 0, ""},
	{"/dev", "/root/dev", "", unix.MS_MOVE, ""},
	{"tmpfs", "/root/run", "tmpfs", 0, "mode=755,size=90%"},
	{"tmpfs", "/root/tmp", "tmpfs", 0, "mode=1777,size=90%"},
	{"tmpfs", "/root/var/lib/docker", "tmpfs", 0, "mode=711,size=90%"},
}

// loopback brings up lo, without whose ::1 Go takes the machine for one that has no IPv6.
func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// enterRoot mounts the table and makes /root the root.
func enterRoot() error {
	for _, m := range table {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
		}
		if m.target == "/memory" {
			for _, dir := range []string{"/memory/upper", "/memory/work"} {
				if err := os.Mkdir(dir, 0o755); err != nil {
					return err
				}
			}
		}
	}
	// The first root file system cannot be pivoted away from.
	if err := unix.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil { // as systemd has it
		return fmt.Errorf("make mounts shared: %w", err)
	}
	return unix.Chdir("/")
}
