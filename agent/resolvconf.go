package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// mark is the first line of a resolv.conf of ours, by which it is known after a crash.
const mark = "# Written by usernet agent, from DHCP. What was here before is in the file of this name with " + saved + " behind it.\n"

// saved is what the name of the file that was there before is given.
const saved = ".before-usernet"

// resolvConf is a resolv.conf(5) of ours in place of another one, which may be a link or not exist.
type resolvConf struct {
	path string
}

// write puts our file in the place of what is there, which is kept if it is not ours.
func (r *resolvConf) write(dns []netip.Addr, search []string) error {
	var b strings.Builder
	b.WriteString(mark)
	for _, a := range dns {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	f, err := os.CreateTemp(filepath.Dir(r.path), "."+filepath.Base(r.path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it has another name when all is well
	_, err = f.WriteString(b.String())
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err != nil {
		return err
	}
	ours, err := r.ours()
	if err != nil {
		return err
	}
	if !ours {
		// A second name instead of a new one: programs that look now find one of the two.
		if err := r.keep(); err != nil {
			return err
		}
	}
	return os.Rename(f.Name(), r.path)
}

// keep gives what is there another name. A former one under that name was left by a crash and is older.
func (r *resolvConf) keep() error {
	err := os.Remove(r.path + saved)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(r.path, r.path+saved); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// ours tells whether the file is one that an agent wrote.
func (r *resolvConf) ours() (bool, error) {
	b, err := os.ReadFile(r.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return bytes.HasPrefix(b, []byte(mark)), nil
}

// restore puts back what was there, unless somebody else has written the file since.
func (r *resolvConf) restore() error {
	ours, err := r.ours()
	if err != nil {
		return err
	}
	if !ours {
		err = os.Remove(r.path + saved)
	} else if err = os.Rename(r.path+saved, r.path); errors.Is(err, fs.ErrNotExist) {
		err = os.Remove(r.path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
