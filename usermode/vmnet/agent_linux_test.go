package vmnet

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/usermode/l2"
)

// Machines, and loads, are processes of their own, this very program run again: the network shares its runtime with nobody, as in the
// gateway, and a profile shows it alone.

// agentArgs holds the arguments of such a process: machine FRAMING MTU | serve ADDR | drive ADDR KIND SECONDS STREAMS.
const agentArgs = "USERNET_TEST_AGENT"

func init() {
	if args := os.Getenv(agentArgs); args != "" {
		if err := agent(strings.Fields(args)); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func agent(args []string) error {
	go func() { // ends with its parent
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	switch args[0] {
	case "machine":
		return runMachine(args[1])
	case "serve":
		return serve(args[1])
	case "drive":
		seconds, err := strconv.ParseFloat(args[3], 64)
		if err != nil {
			return err
		}
		streams, err := strconv.Atoi(args[4])
		if err != nil {
			return err
		}
		return drive(args[1], args[2], time.Duration(seconds*float64(time.Second)), streams)
	}
	return fmt.Errorf("no agent %q", args)
}

const tapName = "eth0"

// runMachine is a machine's network card: a TAP in the namespace that the process was started in, joined to the socket at descriptor 3.
func runMachine(framing string) error {
	c, err := net.FileConn(os.NewFile(3, "link"))
	if err != nil {
		return err
	}
	opts := l2.Options{Framing: l2.HyperKit}
	if framing == l2.Usernet.String() {
		opts = l2.Options{Framing: l2.Usernet, Takes: l2.AllOffload}
	}
	tap, err := openTAP(opts.Takes != 0)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	link := l2.Stream(c, opts)
	ended := make(chan error, 2)
	go func() { ended <- fromTAP(tap, link) }()
	go func() { ended <- toTAP(tap, link) }()
	return <-ended
}

func openTAP(offload bool) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(tapName)
	if err != nil {
		return nil, err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, l2.VirtioLen); err != nil {
		return nil, fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if offload {
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
			return nil, fmt.Errorf("TUNSETOFFLOAD: %w", err)
		}
	}
	return os.NewFile(uintptr(fd), tapName), nil
}

// fromTAP sends what the machine's kernel sends, as much at once as there is.
func fromTAP(tap *os.File, link *l2.Link) error {
	raw, err := tap.SyscallConn()
	if err != nil {
		return err
	}
	var bufs [32][]byte
	for i := range bufs {
		bufs[i] = make([]byte, l2.VirtioLen+l2.MaxFrame)
	}
	frames := make([]l2.Frame, 0, len(bufs))
	for {
		frames = frames[:0]
		bytes := 0
		err := raw.Read(func(fd uintptr) bool {
			for len(frames) < len(bufs) && bytes < 256<<10 {
				b := bufs[len(frames)]
				n, err := unix.Read(int(fd), b)
				if err != nil {
					break
				}
				bytes += n
				frames = append(frames, l2.Frame{Virtio: virtio(b), Head: b[l2.VirtioLen:n]})
			}
			return len(frames) > 0
		})
		if err != nil {
			return err
		}
		if _, err := link.Send(frames); err != nil {
			return err
		}
	}
}

func virtio(b []byte) l2.Virtio {
	ne := binary.NativeEndian
	return l2.Virtio{Flags: b[0], GSOType: b[1], HdrLen: ne.Uint16(b[2:]), GSOSize: ne.Uint16(b[4:]), CsumStart: ne.Uint16(b[6:]), CsumOffset: ne.Uint16(b[8:])}
}

func toTAP(tap *os.File, link *l2.Link) error {
	raw, err := tap.SyscallConn()
	if err != nil {
		return err
	}
	var hdr [l2.VirtioLen]byte
	for {
		frames, err := link.Receive()
		if err != nil {
			return err
		}
		err = raw.Write(func(fd uintptr) bool {
			for _, f := range frames {
				v, ne := f.Virtio, binary.NativeEndian
				hdr[0], hdr[1] = v.Flags, v.GSOType
				for i, n := range []uint16{v.HdrLen, v.GSOSize, v.CsumStart, v.CsumOffset} {
					ne.PutUint16(hdr[2+2*i:], n)
				}
				unix.Writev(int(fd), append([][]byte{hdr[:], f.Head}, f.Tail...))
			}
			return true
		})
		if err != nil {
			return err
		}
	}
}

// serve serves loads. The client's first byte says what it wants: 'u': it sends, 'd': it receives, 'r': every byte comes back.
func serve(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { defer c.Close(); serveLoad(c) }()
	}
}

const benchChunk = 256 << 10

func serveLoad(c net.Conn) {
	b := make([]byte, 1)
	if _, err := io.ReadFull(c, b); err != nil {
		return
	}
	switch b[0] {
	case 'u':
		fmt.Fprintln(c, count(c, time.Time{}))
	case 'd':
		for buf := make([]byte, benchChunk); ; {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	case 'r':
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}
}

// count reads without splicing until the end, or until a time, and returns how many bytes that was.
func count(c net.Conn, end time.Time) (n int64) {
	c.SetReadDeadline(end)
	for buf := make([]byte, benchChunk); ; {
		m, err := c.Read(buf)
		n += int64(m)
		if err != nil {
			return n
		}
	}
}

// drive prints Gbit/s, or the microseconds of the median and the 99th percentile, or connections per second.
func drive(addr, kind string, length time.Duration, streams int) error {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		bytes int64
		trips []time.Duration
		errs  error
	)
	start := time.Now()
	end := start.Add(length)
	for range streams {
		wg.Go(func() {
			n, times, err := driveOne(addr, kind, end)
			mu.Lock()
			defer mu.Unlock()
			bytes, trips, errs = bytes+n, append(trips, times...), errors.Join(errs, err)
		})
	}
	wg.Wait()
	took := time.Since(start).Seconds()
	if errs != nil {
		return errs
	}
	slices.Sort(trips)
	us := func(q float64) float64 { return float64(trips[int(float64(len(trips)-1)*q)].Nanoseconds()) / 1e3 }
	switch kind {
	case "up", "down":
		fmt.Println(float64(bytes)*8/took/1e9, 0)
	case "rr":
		fmt.Println(us(.5), us(.99))
	case "connect":
		fmt.Println(float64(len(trips))/took, us(.99))
	}
	return nil
}

func driveOne(addr, kind string, end time.Time) (bytes int64, times []time.Duration, err error) {
	b := make([]byte, 1)
	for kind == "connect" && time.Now().Before(end) {
		start := time.Now()
		c, err := dialLoad(addr, 'r')
		if err != nil {
			return 0, nil, err
		}
		c.Write(b)
		if _, err := io.ReadFull(c, b); err != nil {
			return 0, nil, err
		}
		times = append(times, time.Since(start))
		c.SetLinger(0) // or a long run is out of ports
		c.Close()
	}
	if kind == "connect" {
		return 0, times, nil
	}
	c, err := dialLoad(addr, map[string]byte{"up": 'u', "down": 'd', "rr": 'r'}[kind])
	if err != nil {
		return 0, nil, err
	}
	defer c.Close()
	switch kind {
	case "up":
		for buf := make([]byte, benchChunk); time.Now().Before(end); {
			if _, err := c.Write(buf); err != nil {
				return 0, nil, err
			}
		}
		c.CloseWrite()
		_, err = fmt.Fscan(c, &bytes)
	case "down":
		bytes = count(c, end)
	case "rr":
		for start := time.Now(); start.Before(end); start = time.Now() {
			if _, err := c.Write(b); err != nil {
				return 0, nil, err
			}
			if _, err := io.ReadFull(c, b); err != nil {
				return 0, nil, err
			}
			times = append(times, time.Since(start))
		}
	}
	return bytes, times, err
}

func dialLoad(addr string, want byte) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	_, err = c.Write([]byte{want})
	return c.(*net.TCPConn), err
}

// startAgent starts an agent in ns. It ends with the test or when stop is called; each line it prints can be read from out.
func startAgent(t testing.TB, ns *netns.NS, file *os.File, args ...any) (out *bufio.Scanner, stop func()) {
	t.Helper()
	_, out, stop = startProcess(t, ns, file, args...)
	return out, stop
}

func startProcess(t testing.TB, ns *netns.NS, file *os.File, args ...any) (p *os.Process, out *bufio.Scanner, stop func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), agentArgs+"="+strings.TrimSpace(fmt.Sprintln(args...)))
	if file != nil {
		cmd.ExtraFiles = []*os.File{file}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	start := cmd.Start
	if ns != nil {
		start = func() error { return ns.Do(cmd.Start) }
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		in.Close()
		cmd.Wait()
	})
	t.Cleanup(stop)
	return cmd.Process, bufio.NewScanner(pipe), stop
}

// runAgent has an agent in ns drive a load and returns the two numbers that it prints.
func runAgent(t testing.TB, ns *netns.NS, args ...any) (a, b float64) {
	t.Helper()
	out, stop := startAgent(t, ns, nil, args...)
	defer stop()
	line := scanLine(t, out)
	if _, err := fmt.Sscan(line, &a, &b); err != nil {
		t.Fatalf("agent %v: %s", args, line)
	}
	return a, b
}

func scanLine(t testing.TB, s *bufio.Scanner) string {
	t.Helper()
	if !s.Scan() {
		t.Fatalf("agent says nothing: %v", s.Err())
	}
	return s.Text()
}
