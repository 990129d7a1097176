//go:build linux

package flows

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/icmperror"
)

// timeExceeded is what a router says where a packet has no hops left.
func timeExceeded(v4 bool) icmperror.Message {
	if v4 {
		return icmperror.Message{Type: uint8(ipv4.ICMPTypeTimeExceeded)}
	}
	return icmperror.Message{Type: uint8(ipv6.ICMPTypeTimeExceeded)}
}

// inside runs f in ns.
func inside(t *testing.T, ns interface{ Do(func() error) error }, f func()) {
	t.Helper()
	if err := ns.Do(func() error { f(); return nil }); err != nil {
		t.Fatal(err)
	}
}

func writeSysctl(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
		t.Error(err)
	}
}

// setSysctl sets a sysctl until the test ends.
func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	old, err := os.ReadFile(filepath.Join("/proc/sys", name))
	if err != nil {
		t.Fatal(err)
	}
	writeSysctl(t, name, value)
	t.Cleanup(func() { writeSysctl(t, name, string(old)) })
}

// unprivileged runs f on a thread that has no capabilities.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never again anything else on it
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		err := unix.Capset(&header, &none[0])
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
