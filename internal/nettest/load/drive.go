package load

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
)

// Drive drives a load from ns to a server. kind is "up" or "down", and v Gbit/s; or "rr", bytes there and back, and v and tail are the
// microseconds of the median and the 99th percentile; or "connect", a connection for each, and v is how many in a second.
func Drive(t testing.TB, ns *netns.NS, to, kind string, seconds float64, streams int) (v, tail float64) {
	t.Helper()
	p := Start(t, ns, nil, "drive", to, kind, seconds, streams)
	defer p.Stop()
	line := p.Line()
	if _, err := fmt.Sscan(line, &v, &tail); err != nil {
		t.Fatalf("%s to %s: %s", kind, to, line)
	}
	return v, tail
}

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
		c, err := dial(addr, echo)
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
	c, err := dial(addr, map[string]byte{"up": sink, "down": source, "rr": echo}[kind])
	if err != nil {
		return 0, nil, err
	}
	defer c.Close()
	switch kind {
	case "up":
		for buf := make([]byte, chunk); time.Now().Before(end); {
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

func dial(addr string, want byte) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	_, err = c.Write([]byte{want})
	return c.(*net.TCPConn), err
}

// Hold opens n connections from ns to a server, which have each been used once, and keeps them until release is called.
func Hold(t testing.TB, ns *netns.NS, to string, n int) (release func()) {
	t.Helper()
	p := Start(t, ns, nil, "hold", to, n)
	if line := p.Line(); line != "held" {
		t.Fatal(line)
	}
	return p.Stop
}

func hold(addr string, n int) error {
	var wg sync.WaitGroup
	conns := make(chan net.Conn, n)
	errs := make(chan error, 16)
	for i := range 16 {
		wg.Go(func() {
			for range n / 16 {
				c, err := net.DialTimeout("tcp", addr, 10*time.Second)
				if err == nil {
					c.Write([]byte{echo, 'x'})
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
