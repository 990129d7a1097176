package load

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	dialTimeout = 5 * time.Second
	maxDone     = 100_000 // connections or round trips of one job
)

func dial(addr netip.AddrPort, timeout time.Duration) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: timeout}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp4", addr.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// streams dials j.Streams connections, runs f on all of them at the same time, and resets them.
func streams(j Job, f func(*net.TCPConn) error) error {
	var conns []*net.TCPConn
	defer func() {
		for _, c := range conns {
			c.SetLinger(0)
			c.Close()
		}
	}()
	for range max(j.Streams, 1) {
		c, err := dial(j.Addr, dialTimeout)
		if err != nil {
			return err
		}
		conns = append(conns, c)
	}
	var g errgroup.Group
	for _, c := range conns {
		g.Go(func() error { return f(c) })
	}
	return g.Wait()
}

// tcpUp sends for a little longer than the serving end counts.
func tcpUp(j Job) (Result, error) {
	end := time.Now().Add(j.Length + 100*time.Millisecond)
	err := streams(j, func(c *net.TCPConn) error {
		c.SetDeadline(end)
		_, err := c.Write(header(sinkByte, j))
		for buf := make([]byte, chunk); err == nil; {
			_, err = c.Write(buf)
		}
		// The other end resets the connection when its window is over.
		if errors.Is(err, os.ErrDeadlineExceeded) || time.Until(end) < 100*time.Millisecond {
			return nil
		}
		return err
	})
	return Result{}, err
}

func tcpDown(j Job) (Result, error) {
	var n atomic.Int64
	var end time.Time
	var once sync.Once
	err := streams(j, func(c *net.TCPConn) error {
		once.Do(func() { end = time.Now().Add(j.Length) })
		c.SetDeadline(end)
		_, err := c.Write(header(sendByte, j))
		for buf := make([]byte, chunk); err == nil; {
			var m int
			m, err = c.Read(buf)
			n.Add(int64(m))
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		return err
	})
	return Result{Bytes: n.Load(), Elapsed: j.Length}, err
}

func tcpEcho(j Job) (Result, error) {
	c, err := dial(j.Addr, dialTimeout)
	if err != nil {
		return Result{}, err
	}
	defer c.Close()
	start := time.Now()
	end := start.Add(j.Length)
	c.SetDeadline(end.Add(5 * time.Second))
	var trips []time.Duration
	for b := []byte{echoByte}; len(trips) < maxDone; {
		sent := time.Now()
		if sent.After(end) {
			break
		}
		if _, err := c.Write(b); err != nil {
			return Result{}, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return Result{}, err
		}
		trips = append(trips, time.Since(sent))
	}
	return timed(trips, start), nil
}

// timed is the result of round trips that began at start. It sorts them.
func timed(trips []time.Duration, start time.Time) Result {
	slices.Sort(trips)
	return Result{Done: len(trips), Elapsed: time.Since(start), P50: percentile(trips, 50), P99: percentile(trips, 99)}
}

// percentile is the smallest of the sorted values that p per cent of them do not exceed; 0 if there is none.
func percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[(len(sorted)*p+99)/100-1]
}

// tcpConnect goes on after a connection that failed; none at all is an error.
func tcpConnect(j Job) (Result, error) {
	start := time.Now()
	end := start.Add(j.Length)
	var mu sync.Mutex
	var r Result
	var first error
	var wg sync.WaitGroup
	for range max(j.Streams, 1) {
		wg.Go(func() {
			for more := true; more; {
				err := connect(j.Addr)
				mu.Lock()
				if err == nil {
					r.Done++
				} else if r.Failed++; first == nil {
					first = fmt.Errorf("connection %d: %w", r.Done+r.Failed, err)
				}
				more = time.Now().Before(end) && r.Done+r.Failed < maxDone
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	r.Elapsed = time.Since(start)
	if r.Done == 0 {
		return r, first
	}
	if first != nil {
		r.Failure = first.Error()
	}
	return r, nil
}

// connect makes a connection that the other end ends, so that TIME_WAIT is there: the dialling end would run out of ports.
func connect(addr netip.AddrPort) error {
	c, err := dial(addr, dialTimeout)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(dialTimeout))
	b := []byte{closeByte}
	if _, err := c.Write(b); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if n, err := c.Read(b); n != 0 || err != io.EOF {
		return fmt.Errorf("wait for the end: %w", err)
	}
	return nil
}

// holding is connections that do nothing.
type holding struct {
	mu    sync.Mutex
	conns []*net.TCPConn
}

// open opens j.Streams connections within j.Length and tells how many stand then.
func (h *holding) open(j Job) (r Result) {
	end := time.Now().Add(j.Length)
	left := make(chan struct{}, j.Streams)
	for range j.Streams {
		left <- struct{}{}
	}
	close(left)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range left {
				c, err := idle(j.Addr, end)
				h.mu.Lock()
				if err == nil {
					h.conns = append(h.conns, c)
				} else if r.Failed++; r.Failed == 1 {
					r.Failure = err.Error()
				}
				h.mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	r.Done = len(h.conns)
	return r
}

// idle opens a connection that was used once.
func idle(addr netip.AddrPort, end time.Time) (*net.TCPConn, error) {
	c, err := dial(addr, min(dialTimeout, max(time.Until(end), time.Nanosecond)))
	if err != nil {
		return nil, err
	}
	c.SetDeadline(end)
	b := []byte{echoByte}
	_, err = c.Write(b)
	if err == nil {
		_, err = io.ReadFull(c, b)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (h *holding) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.conns {
		c.SetLinger(0)
		c.Close()
	}
	h.conns = nil
}
