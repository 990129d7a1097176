package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// The load's protocol: the client's first byte says what it wants, u: it sends, d: it receives, r: one byte back and
// forth. What the side that receives counted is the result.

const chunk = 256 << 10 // bytes of one write

// agent is what runs inside containers: a server, or a client that prints one number.
func agent(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		s, err := listen(args[1])
		if err != nil {
			return err
		}
		s.wg.Wait()
		return nil
	case len(args) == 4 && args[0] == "drive":
		length, err := time.ParseDuration(args[3])
		if err != nil {
			return err
		}
		c, err := dial(args[1])
		if err != nil {
			return err
		}
		defer c.Close()
		v, err := c.drive(args[2], length)
		if err != nil {
			return err
		}
		fmt.Println(v)
		return nil
	}
	return errors.New("usage: agent serve ADDR | agent drive ADDR up|down|rtt LENGTH")
}

type server struct {
	l  net.Listener
	wg sync.WaitGroup
}

func listen(addr string) (*server, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &server{l: l}
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	return s, nil
}

func (s *server) close() { s.l.Close() }

func serve(c net.Conn) {
	what := make([]byte, 1)
	if _, err := io.ReadFull(c, what); err != nil {
		return
	}
	switch what[0] {
	case 'u':
		n := count(c)
		fmt.Fprintf(c, "%d", n)
	case 'd':
		for buf := make([]byte, chunk); ; {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	case 'r':
		for {
			if _, err := io.ReadFull(c, what); err != nil {
				return
			}
			if _, err := c.Write(what); err != nil {
				return
			}
		}
	}
}

// count reads to the end. It hides TCPConn.WriteTo, whose splice(2) would measure something else than a reader.
func count(c net.Conn) (n int64) {
	buf := make([]byte, chunk)
	for {
		m, err := c.Read(buf)
		n += int64(m)
		if err != nil {
			return n
		}
	}
}

type client struct{ *net.TCPConn }

func dial(addr string) (*client, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return &client{c.(*net.TCPConn)}, nil
}

// drive loads the connection for about length and returns Gbit/s, or microseconds of the median round trip.
func (c *client) drive(what string, length time.Duration) (float64, error) {
	end := time.Now().Add(length)
	c.SetDeadline(end.Add(10 * time.Second))
	start := time.Now()
	switch what {
	case "up":
		if _, err := c.Write([]byte("u")); err != nil {
			return 0, err
		}
		for buf := make([]byte, chunk); time.Now().Before(end); {
			if _, err := c.Write(buf); err != nil {
				return 0, err
			}
		}
		if err := c.CloseWrite(); err != nil {
			return 0, err
		}
		var n int64
		if _, err := fmt.Fscan(c, &n); err != nil {
			return 0, fmt.Errorf("read the count: %w", err)
		}
		return gbits(n, time.Since(start)), nil
	case "down":
		if _, err := c.Write([]byte("d")); err != nil {
			return 0, err
		}
		var n int64
		for buf := make([]byte, chunk); time.Now().Before(end); {
			m, err := c.Read(buf)
			if err != nil {
				return 0, err
			}
			n += int64(m)
		}
		return gbits(n, time.Since(start)), nil
	case "rtt":
		return c.rtt(end)
	}
	return 0, fmt.Errorf("no load %q", what)
}

func gbits(n int64, d time.Duration) float64 { return float64(n) * 8 / d.Seconds() / 1e9 }

func (c *client) rtt(end time.Time) (float64, error) {
	if _, err := c.Write([]byte("r")); err != nil {
		return 0, err
	}
	var trips []time.Duration
	for b := make([]byte, 1); time.Now().Before(end); {
		start := time.Now()
		if _, err := c.Write(b); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return 0, err
		}
		trips = append(trips, time.Since(start))
	}
	slices.Sort(trips)
	return float64(trips[len(trips)/2].Nanoseconds()) / 1000, nil
}
