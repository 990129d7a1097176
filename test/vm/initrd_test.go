package vm_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/usernet/usernet/test/engine"
)

// initrd is an initial RAM file system for test/cmd/guest: a cpio archive of the kind "newc", which the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst describes.
type initrd struct {
	to    io.Writer
	inode int
	err   error
}

const (
	modeDir  = 0o040755
	modeFile = 0o100755
	modeLink = 0o120777
)

func (i *initrd) add(name string, mode int, content []byte) {
	if i.err != nil {
		return
	}
	i.inode++
	var b bytes.Buffer
	fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		i.inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	b.WriteString(name)
	b.WriteByte(0)
	pad(&b)
	b.Write(content)
	pad(&b)
	_, i.err = i.to.Write(b.Bytes())
}

// pad fills b up to a multiple of four bytes.
func pad(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

// file adds a copy of a file of the machine that the test runs on.
func (i *initrd) file(name, path string) {
	content, err := os.ReadFile(path)
	if err != nil && i.err == nil {
		i.err = err
	}
	i.add(name, modeFile, content)
}

// end adds what marks the end.
func (i *initrd) end() error {
	i.add("TRAILER!!!", 0, nil)
	return i.err
}

// realGvforwarder is the name of the real gvforwarder in a machine, where gvforwarder is usernet.
const realGvforwarder = "real-gvforwarder"

// writeInitrd writes the file system of a machine, with programs from the directory bin.
func writeInitrd(to io.Writer, bin string) error {
	i := &initrd{to: to}
	i.file("init", filepath.Join(bin, "guest"))
	for _, dir := range []string{"dev", "modules", "payload"} {
		i.add(dir, modeDir, nil)
	}
	list, err := os.ReadFile(engine.MachineFile("modules/list"))
	if err != nil {
		return err
	}
	i.add("modules/list", modeFile, list)
	for _, m := range strings.Fields(string(list)) {
		i.file("modules/"+m, engine.MachineFile("modules/"+m))
	}
	for _, p := range []string{"guest", "usernet", "probe", "sshd", "vsock.test"} {
		i.file("payload/"+p, filepath.Join(bin, p))
	}
	i.file("payload/"+realGvforwarder, engine.Peer("gvforwarder"))
	i.add("payload/gvforwarder", modeLink, []byte("usernet"))
	i.file("payload/lease.sh", "lease.sh")
	i.file("payload/image.tar", filepath.Join(bin, "../image.tar"))
	return i.end()
}
