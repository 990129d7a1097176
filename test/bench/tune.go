package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
)

// sysctls are what every network namespace gets, for many short connections and for ping sockets. What one subject leaves
// in TIME_WAIT must not burden the next: pasta, for one, reads through all sockets of its two namespaces every second.
var sysctls = map[string]string{
	"ping_group_range": "0 2147483647", "ip_local_port_range": "10000 65000", "tcp_max_tw_buckets": "200",
}

// tune sets the sysctls of every network namespace there is.
func (b *rig) tune() (err error) {
	pretend := b.namespaces()
	for _, ns := range append(pretend, b.Outside().NS()) {
		err = errors.Join(err, ns.Do(func() error {
			for name, value := range sysctls {
				if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0o644); err != nil {
					return err
				}
			}
			return congestion()
		}))
	}
	for _, ns := range pretend {
		ns.Close()
	}
	return err
}

// congestion sets the algorithm that new TCP sockets of the calling thread's namespace begin with: Linux' own default,
// cubic, or where the machine does not let a namespace have that, reno, which behaves alike where nothing is lost. Some
// machines' default is bbr: its pacing halves what even a plain veth carries.
func congestion() error {
	const file = "/proc/sys/net/ipv4/tcp_congestion_control"
	now, err := os.ReadFile(file)
	if err != nil || strings.TrimSpace(string(now)) == "cubic" {
		return err
	}
	err = os.WriteFile(file, []byte("cubic"), 0o644)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		err = os.WriteFile(file, []byte("reno"), 0o644)
	}
	return err
}

// namespaces opens the network namespaces of the pretend host: those of its processes, and those that usernet pinned.
func (b *rig) namespaces() (all []*netns.NS) {
	paths, _ := filepath.Glob(b.Path("/proc/[0-9]*/ns/net"))
	filepath.WalkDir(b.Path(engine.RunDir), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			paths = append(paths, path)
		}
		return nil // gone meanwhile
	})
	for _, p := range paths {
		if ns, err := netns.Open(p); err == nil {
			all = append(all, ns)
		}
	}
	return all
}
