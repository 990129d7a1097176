package netns_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

// rootOfOwn marks a process that is root of a user namespace of its own, in the network namespace of another one.
const rootOfOwn = "USERNET_NETNS_ROOT_OF_OWN"

func TestMain(m *testing.M) {
	if os.Getenv(rootOfOwn) != "" {
		os.Exit(m.Run())
	}
	os.Exit(nettest.Main(m))
}

func TestCreatePinsAndRemoveUnpins(t *testing.T) {
	nettest.NoLeaks(t)
	path := filepath.Join(t.TempDir(), "deep", "web")
	ns, err := netns.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	add := func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "inside0"}})
	}
	if err := ns.Do(add); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName("inside0"); err == nil {
		t.Error("the link made inside is visible outside")
	}
	ns.Close()

	again, err := netns.Open(path)
	if err != nil {
		t.Fatalf("open the pin: %v", err)
	}
	if err := again.Do(func() error { _, err := netlink.LinkByName("inside0"); return err }); err != nil {
		t.Errorf("the pinned namespace lost its link: %v", err)
	}
	again.Close()
	for range 2 {
		if err := netns.Remove(path); err != nil {
			t.Errorf("Remove: %v", err)
		}
	}
	if _, err := netns.Open(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open after Remove: %v, want not exist", err)
	}
}

// Rootless Podman's user is root of a user namespace, and in the network namespace of the host: threads that go into a
// namespace cannot come back. The same tests have to hold.
func TestWithoutReturn(t *testing.T) {
	if os.Getenv(rootOfOwn) != "" {
		t.Skip("this is without return")
	}
	nettest.NoLeaks(t)
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), rootOfOwn+"=1")
	own := []syscall.SysProcIDMap{{Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: own, GidMappings: own,
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestEveryThreadIsAtHome") {
		t.Errorf("%v: %s", err, out)
	}
}

// Nothing that runs later may find itself in a namespace that was entered, and /proc must show the process where it is.
func TestEveryThreadIsAtHome(t *testing.T) {
	home, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			err := ns.Do(func() error {
				if now, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || now == home {
					return fmt.Errorf("in %s, %w, want another than at home", now, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	self, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	if err := self.Do(func() error { return nil }); err != nil {
		t.Errorf("enter the own namespace: %v", err)
	}
	if err := ns.Do(func() error { return os.ErrDeadlineExceeded }); err != os.ErrDeadlineExceeded {
		t.Errorf("Do = %v, want what its function returns", err)
	}
	// A thread that ends may show for a moment.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		strays := strayThreads(t, home)
		if strays == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("threads are elsewhere: %v", strays)
		}
	}
}

func strayThreads(t *testing.T, home string) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(links) == 0 {
		t.Fatalf("no threads: %v", err)
	}
	var strays []string
	for _, link := range append(links, "/proc/self/ns/net") {
		if at, err := os.Readlink(link); err == nil && at != home {
			strays = append(strays, link)
		}
	}
	return strays
}

// BenchmarkDo is what going into a namespace costs, and without return.
func BenchmarkDo(b *testing.B) {
	ns, err := netns.New()
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	for b.Loop() {
		if err := ns.Do(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func TestOpenRefusesAnOrdinaryFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if there, err := netns.At(path); there || err != nil {
		t.Errorf("At takes an ordinary file for a network namespace: %t, %v", there, err)
	}
	if there, err := netns.At("/proc/self/ns/net"); !there || err != nil {
		t.Errorf("At does not know the process's own namespace: %t, %v", there, err)
	}
	if ns, err := netns.Open(path); err == nil {
		ns.Close()
		t.Error("Open took an ordinary file for a network namespace")
	}
}
