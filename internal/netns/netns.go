// Package netns opens, makes and pins network namespaces and runs code in them. It knows nothing of what is inside.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// NS is an open network namespace. Its descriptor keeps the namespace alive until Close.
type NS struct {
	f *os.File
}

// Open opens the namespace at path: a pinned one, or /proc/PID/ns/net.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return From(f)
}

// From takes a descriptor of a namespace, however it was come by. After an error it is closed.
func From(f *os.File) (*NS, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("open network namespace: %s is not one: %w", f.Name(), fs.ErrNotExist)
	}
	return &NS{f}, nil
}

// At tells whether there is a namespace at path, without opening what is there.
func At(path string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for a network namespace at %s: %w", path, err)
	}
	return st.Type == unix.NSFS_MAGIC, nil
}

// Current opens the namespace of the calling process.
func Current() (*NS, error) { return Open(own) }

// own is the namespace of the calling thread.
const own = "/proc/thread-self/ns/net"

// Own tells whether the network namespace of the calling process belongs to the user namespace that it is in. It does not
// where an ordinary user is root of a user namespace but has the host's network.
func Own() (bool, error) {
	f, err := os.Open(own)
	if err != nil {
		return false, fmt.Errorf("open own network namespace: %w", err)
	}
	defer f.Close()
	owner, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if errors.Is(err, unix.EPERM) {
		return false, nil // it is outside of ours
	}
	if err != nil {
		return false, fmt.Errorf("find the owner of the network namespace: %w", err)
	}
	of := os.NewFile(uintptr(owner), "user namespace")
	defer of.Close()
	theirs, err := of.Stat()
	if err != nil {
		return false, fmt.Errorf("find the owner of the network namespace: %w", err)
	}
	ours, err := os.Stat("/proc/self/ns/user")
	if err != nil {
		return false, fmt.Errorf("find own user namespace: %w", err)
	}
	return os.SameFile(ours, theirs), nil
}

// Create makes a new namespace and pins it at path, which must not be pinned yet: it then outlives the process, until
// Remove. Missing parent directories are made.
func Create(path string) (_ *NS, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("pin network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, fmt.Errorf("pin network namespace: %w", err)
	}
	f.Close()
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		if err := unix.Mount(own, path, "none", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin network namespace at %s: %w", path, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return Open(path)
}

// New makes a new namespace that lives as long as somebody has it open.
func New() (ns *NS, err error) {
	err = onOwnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		ns, err = Current()
		return err
	})
	return ns, err
}

// Remove takes the pin at path away. The namespace goes when nobody has it open any more. It succeeds when nothing
// is there.
func Remove(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpin network namespace: %w", err)
	}
	return nil
}

// Fd is the namespace's descriptor, for setns and for IFLA_NET_NS_FD. It belongs to ns.
func (ns *NS) Fd() int { return int(ns.f.Fd()) }

// Do runs f on an operating system thread that is in the namespace. Sockets and descriptors that f makes stay in
// the namespace; goroutines that f starts do not run in it.
func (ns *NS) Do(f func() error) error {
	if !mayReturn() {
		return ns.doOneWay(f)
	}
	runtime.LockOSThread()
	home, err := os.Open(own)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Setns(ns.Fd(), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	// A thread that cannot go home stays locked: the runtime ends it with its goroutine instead of reusing it.
	defer func() {
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// mayReturn tells whether a thread that has entered another namespace can come back. Root of a user namespace cannot, if
// the namespace that it comes from belongs to another one: rootless Podman runs us like that.
var mayReturn = sync.OnceValue(func() bool {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := os.Open(own)
	if err != nil {
		return true // Do will tell
	}
	defer home.Close()
	return !errors.Is(unix.Setns(int(home.Fd()), unix.CLONE_NEWNET), unix.EPERM)
})

// doOneWay is Do on a thread that goes in and never comes out. Even the own namespace could not be entered.
func (ns *NS) doOneWay(f func() error) error {
	there, err := ns.f.Stat()
	if err != nil {
		return fmt.Errorf("look at a network namespace: %w", err)
	}
	if here, err := os.Stat(own); err == nil && os.SameFile(here, there) {
		return f()
	}
	return onOwnThread(func() error {
		if err := unix.Setns(ns.Fd(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// Close lets go of the namespace; a pin keeps it alive.
func (ns *NS) Close() error { return ns.f.Close() }

// onOwnThread runs f on a thread that is thrown away afterwards, whatever f did to it.
func onOwnThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The runtime cannot end the main thread, which is also what others see of the process. While this
			// goroutine has it, another one is given another thread.
			defer runtime.UnlockOSThread()
			done <- onOwnThread(f)
			return
		}
		done <- f()
	}()
	return <-done
}
