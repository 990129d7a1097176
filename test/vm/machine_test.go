package vm_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/engine"
	"github.com/usernet/usernet/test/vm/console"
)

// machine is a virtual machine to boot.
type machine struct {
	memory int    // MiB
	vsock  bool   // it has a vsock device
	nic    bool   // it has a network card, whose frames are streamed to the socket in rig.frames
	mac    string // of the card; "": firstMAC
}

// cid is the number of the machine on its vsock. The host of a machine is always 2.
const cid = 3

// vsock is the path of the machine's vsock on the host, in the form of hypervisors with hybrid sockets.
func (r *rig) vsock() string { return filepath.Join(r.m.Own, "vm.vsock") }

// frames is where the machine's network card connects to.
func (r *rig) frames() string { return filepath.Join(r.m.Own, "frames.sock") }

// boot starts the machine and waits until it takes commands. It goes with the test.
func (r *rig) boot(m machine) {
	r.Helper()
	r.power(m)()
}

// power starts the machine and returns what waits until it takes commands, so that machines come up side by side.
func (r *rig) power(m machine) (up func()) {
	r.Helper()
	start := time.Now()
	files := r.bootFiles()
	args := append(hardware(m), "-kernel", fd(0), "-initrd", fd(1), "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
		"-drive", "if=none,id=disk,format=raw,readonly=on,file="+fd(2), "-device", "virtio-blk-pci,drive=disk",
		"-serial", "file:"+r.console())
	if m.vsock {
		device := filepath.Join(r.m.Own, "vhost.sock")
		r.daemon(func() error { return there(device) }, "vhost-device-vsock",
			"--guest-cid", strconv.Itoa(cid), "--socket", device, "--uds-path", r.vsock())
		args = append(args, "-chardev", "socket,id=vsock,path="+device, "-device", "vhost-user-vsock-pci,chardev=vsock")
	}
	if m.nic {
		args = append(args, "-netdev", "stream,id=net,server=off,reconnect-ms=200,addr.type=unix,addr.path="+r.frames(),
			"-device", "virtio-net-pci,netdev=net,romfile=,mac="+cmp.Or(m.mac, firstMAC))
	}
	port, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(r.m.Own, r.name+"port.sock"), Net: "unix"})
	r.must(err)
	r.Cleanup(func() { port.Close() }) // it may be closed
	r.must(os.Chmod(port.Addr().String(), 0o666))
	args = append(args, "-chardev", "socket,id=port,path="+port.Addr().String(), "-device", "virtserialport,chardev=port")
	hypervisor, err := r.m.Daemon(files, qemu, args...)
	r.must(err)
	r.qemu = hypervisor
	r.Cleanup(func() {
		r.check(hypervisor.Stop(syscall.SIGKILL))
		r.showLog(qemu)
	})
	return func() {
		r.Helper()
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		defer port.Close()
		r.connect(ctx, port)
		r.Logf("booted in %v", time.Since(start).Round(100*time.Millisecond))
	}
}

// qemu is the program's name.
const qemu = "qemu-system-x86_64"

// bootFiles are the kernel, the initial RAM file system and the disk.
func (r *rig) bootFiles() []*os.File {
	r.Helper()
	var files []*os.File
	for _, path := range []string{engine.MachineFile("vmlinuz"), r.initrd, engine.MachineFile("disk.ext4")} {
		f, err := os.Open(path)
		r.must(err)
		r.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	return files
}

// fd is the path by which QEMU, which is in another root, opens the file with that index again.
func fd(index int) string { return fmt.Sprintf("/proc/self/fd/%d", 3+index) }

func hardware(m machine) []string {
	size := strconv.Itoa(m.memory) + "M"
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
		// The vsock's device shares the machine's memory.
		"-m", size, "-object", "memory-backend-memfd,id=memory,share=on,size=" + size, "-machine", "q35,memory-backend=memory",
		"-device", "virtio-serial-pci", "-device", "virtio-rng-pci",
	}
}

// connect waits for the machine to open its serial port and to come up.
func (r *rig) connect(ctx context.Context, port *net.UnixListener) {
	r.Helper()
	stop := context.AfterFunc(ctx, func() { port.Close() })
	defer stop()
	ended := make(chan struct{})
	go func() {
		select {
		case <-r.qemu.Ended():
			port.Close()
		case <-ended:
		}
	}()
	conn, err := port.Accept()
	close(ended)
	if err != nil {
		r.Fatalf("QEMU does not open the serial port: %v", err)
	}
	r.guest = console.NewClient(conn)
	run, cancel := context.WithCancel(r.background())
	done := make(chan error, 1)
	go func() { done <- r.guest.Run(run) }()
	r.Cleanup(func() {
		cancel()
		r.check(<-done)
	})
	r.Cleanup(r.showConsole)
	if err := r.guest.Up(ctx); err != nil {
		r.Fatalf("the machine does not come up: %v", err)
	}
}

// console is the file with what the machine's kernel prints.
func (r *rig) console() string { return filepath.Join(r.m.Own, r.name+"console.log") }

func (r *rig) showConsole() {
	if text, err := os.ReadFile(r.console()); r.Failed() && err == nil {
		r.Logf("the machine's console:\n%s", text[max(0, len(text)-8000):])
	}
}

// there says whether a path is.
func there(path string) error {
	_, err := os.Lstat(path)
	return err
}

// off switches the machine off, as its own shutdown would.
func (r *rig) off() {
	r.Helper()
	if _, err := r.try("poweroff", "-f"); err != nil && !errors.Is(err, console.ErrEnded) {
		r.Error(err)
	}
}
