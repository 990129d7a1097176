package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestResolvConf(t *testing.T) {
	const before, ours, others = "nameserver 192.0.2.1\n", "nameserver 10.200.0.1\n", "nameserver 192.0.2.9\n"
	plain := func(t *testing.T, path string) { create(t, path, before) }
	for _, tt := range []struct {
		name  string
		begin func(t *testing.T, path string)
		then  func(t *testing.T, path string) // after writing
		want  string                          // in the end; "": no file
	}{
		{"a file", plain, nil, before},
		{"none", nil, nil, ""},
		{"a link", func(t *testing.T, path string) {
			create(t, path+".target", before)
			if err := os.Symlink(path+".target", path); err != nil {
				t.Fatal(err)
			}
		}, func(t *testing.T, path string) {
			if b, err := os.ReadFile(path + ".target"); err != nil || string(b) != before {
				t.Errorf("behind the link: %q, %v", b, err)
			}
		}, before},
		{"a link that leads nowhere", func(t *testing.T, path string) {
			if err := os.Symlink("nowhere", path); err != nil {
				t.Fatal(err)
			}
		}, nil, "-> nowhere"},
		{"somebody else writes it meanwhile", plain, func(t *testing.T, path string) { create(t, path, others) }, others},
		{"somebody else removes it meanwhile", plain, func(t *testing.T, path string) { os.Remove(path) }, ""},
		// Killed, an agent leaves its file, and the one before beside it.
		{"left by a crash", func(t *testing.T, path string) {
			create(t, path, mark+ours)
			create(t, path+saved, before)
		}, nil, before},
		{"left by a crash, and there was none before", func(t *testing.T, path string) { create(t, path, mark+ours) }, nil, ""},
		{"left by an older crash", func(t *testing.T, path string) {
			create(t, path, others)
			create(t, path+saved, before)
		}, nil, others},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "resolv.conf")
			if tt.begin != nil {
				tt.begin(t, path)
			}
			r := &resolvConf{path}
			for range 2 {
				if err := r.write([]netip.Addr{netip.MustParseAddr("10.200.0.1")}, nil); err != nil {
					t.Fatal(err)
				}
				if b, err := os.ReadFile(path); err != nil || strings.TrimPrefix(string(b), mark) != ours {
					t.Fatalf("written: %q, %v", b, err)
				}
			}
			if tt.then != nil {
				tt.then(t, path)
			}
			for range 2 {
				if err := r.restore(); err != nil {
					t.Fatal(err)
				}
			}
			got := content(path)
			if got != tt.want {
				t.Errorf("in the end %q, want %q", got, tt.want)
			}
			left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*"))
			if err != nil || len(left) > 2 {
				t.Errorf("files in the end: %q, %v", left, err)
			}
			if _, err := os.Lstat(path + saved); err == nil {
				t.Error("the saved file is left")
			}
		})
	}
}

func create(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// content is a file's, or where a link leads that leads nowhere.
func content(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		if to, err := os.Readlink(path); err == nil {
			return "-> " + to
		}
	}
	return string(b)
}
