package usermode

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
)

// A load is driven by processes of their own, this very program run again: netstack shares its runtime with nobody,
// as in the daemon, and a profile shows it alone.
//
// The client's first byte says what it wants: 'u': it sends, 'd': it receives, 'r': every byte comes back.

// agentArgs holds the arguments of such a process: serve ADDR | drive ADDR KIND SECONDS STREAMS | hold ADDR COUNT.
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
	case "serve":
		l, err := net.Listen("tcp", args[1])
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
	case "hold":
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return holdConns(args[1], n)
	}
	return fmt.Errorf("no agent %q", args)
}

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
	end := time.Now().Add(length)
	start := time.Now()
	for range streams {
		wg.Go(func() {
			n, times, err := driveOne(addr, kind, end)
			mu.Lock()
			defer mu.Unlock()
			bytes += n
			trips = append(trips, times...)
			errs = errors.Join(errs, err)
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
	d := net.Dialer{Timeout: 10 * time.Second}
	d.SetMultipathTCP(false)
	dial := func(want byte) (*net.TCPConn, error) {
		c, err := d.Dial("tcp", addr)
		if err != nil {
			return nil, err
		}
		_, err = c.Write([]byte{want})
		return c.(*net.TCPConn), err
	}
	b := make([]byte, 1)
	for kind == "connect" && time.Now().Before(end) {
		start := time.Now()
		c, err := dial('r')
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
	want := map[string]byte{"up": 'u', "down": 'd', "rr": 'r'}[kind]
	c, err := dial(want)
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

// holdConns opens n connections that have each been used once, says so and keeps them.
func holdConns(addr string, n int) error {
	var wg sync.WaitGroup
	conns := make(chan net.Conn, n)
	errs := make(chan error, 16)
	for i := range 16 {
		wg.Go(func() {
			for range n / 16 {
				c, err := net.DialTimeout("tcp", addr, 10*time.Second)
				if err == nil {
					c.Write([]byte("rx"))
					_, err = io.ReadFull(c, make([]byte, 1))
				}
				if err != nil {
					errs <- fmt.Errorf("worker %d: %w", i, err)
					return
				}
				conns <- c // a connection that nobody refers to is closed
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
	}
	fmt.Println("held")
	time.Sleep(time.Hour)
	runtime.KeepAlive(conns)
	return nil
}

// startAgent starts an agent in ns. It ends with the test or when stop is called; each line it prints can be read from out.
func startAgent(t testing.TB, ns *netns.NS, args ...any) (out *bufio.Scanner, stop func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), agentArgs+"="+strings.TrimSpace(fmt.Sprintln(args...)))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		in.Close()
		cmd.Wait()
	})
	t.Cleanup(stop)
	return bufio.NewScanner(pipe), stop
}

// runAgent has an agent in ns drive a load and returns the two numbers that it prints.
func runAgent(t testing.TB, ns *netns.NS, args ...any) (a, b float64) {
	t.Helper()
	out, stop := startAgent(t, ns, args...)
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

// startServer starts a server in ns, on a port of the kernel's choice.
func startServer(t testing.TB, ns *netns.NS, addr netip.Addr) (to string) {
	t.Helper()
	out, _ := startAgent(t, ns, "serve", netip.AddrPortFrom(addr, 0))
	return scanLine(t, out)
}
