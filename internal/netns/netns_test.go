package netns_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

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
