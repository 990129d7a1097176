// Guest is the first process of the virtual machines that tests boot. The kernel starts it from an initial RAM file system, which has
// kernel modules in /modules, listed in /modules/list in the order to load them, and what the test brings in /payload. It
// puts the machine's disk in the place of that, with a file system in memory over it, and runs what it is told over the serial
// port. When that ends, it switches the machine off.
//
//	guest echo URL    in a machine that is up, sends back what comes by a vsock
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/test/vm/console"
	"github.com/usernet/usernet/vsock"
)

func main() {
	if os.Getpid() != 1 {
		run := serve
		if len(os.Args) == 3 && os.Args[1] == "echo" {
			run = func() error { return echo(os.Args[2]) }
		}
		if err := run(); err != nil {
			fmt.Println("guest:", err)
			os.Exit(1)
		}
		return
	}
	if err := boot(); err != nil {
		fmt.Println("guest:", err) // on the machine's console, which the test shows when the machine does not come up
	}
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("guest: switch off:", err)
	}
}

// boot makes the file systems and then only collects the processes that end, until the one that serves has.
func boot() error {
	if err := modules("/modules"); err != nil {
		return err
	}
	if err := enterRoot(); err != nil {
		return err
	}
	if err := loopback(); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = []string{"PATH=/payload:/usr/bin", "HOME=/root", "LC_ALL=C.UTF-8"}
	if err := cmd.Start(); err != nil {
		return err
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if pid == cmd.Process.Pid {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("wait: %w", err)
		}
	}
}

func serve() error {
	port, err := serialPort()
	if err != nil {
		return err
	}
	defer port.Close()
	return console.Serve(port)
}

func echo(url string) error {
	a, err := vsock.Parse(url)
	if err != nil {
		return err
	}
	l, err := vsock.Listen(a)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			io.Copy(conn, conn)
			conn.Close()
		}()
	}
}

// serialPort opens the first port of the virtio serial device; the kernel may be about to find it.
func serialPort() (*os.File, error) {
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, "/dev", unix.IN_CREATE); err != nil {
		return nil, err
	}
	for b := make([]byte, 4096); ; {
		if found, _ := filepath.Glob("/dev/vport*p1"); len(found) > 0 {
			return os.OpenFile(found[0], os.O_RDWR, 0)
		}
		if _, err := unix.Read(watch, b); err != nil {
			return nil, fmt.Errorf("wait for the serial port: %w", err)
		}
	}
}

func modules(dir string) error {
	list, err := os.Open(filepath.Join(dir, "list"))
	if err != nil {
		return err
	}
	defer list.Close()
	lines := bufio.NewScanner(list)
	for lines.Scan() {
		f, err := os.Open(filepath.Join(dir, lines.Text()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("load %s: %w", lines.Text(), err)
		}
	}
	return lines.Err()
}
