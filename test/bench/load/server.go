package load

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// What the serving end reads first: one of these bytes, and of some a job's number and length in nanoseconds, 8 bytes
// each, big endian.
const (
	sinkByte  = 'u' // with number and length: what follows is counted
	sendByte  = 'd' // with number and length: it sends
	echoByte  = 'e' // every byte or datagram comes back
	closeByte = 'c' // one byte comes back and the end
)

const (
	headerSize = 17
	chunk      = 256 << 10 // bytes of one write
	Datagram   = 1400      // bytes of payload
	small      = 64        // bytes of an exchange's datagram

	// A connection that nobody ends goes after this.
	lifetime = 3 * time.Minute
)

func header(kind byte, j Job) []byte {
	b := binary.BigEndian.AppendUint64([]byte{kind}, j.ID)
	return binary.BigEndian.AppendUint64(b, uint64(j.Length))
}

// parse reads what follows a header's first byte.
func parse(b []byte) (id uint64, length time.Duration) {
	return binary.BigEndian.Uint64(b), min(time.Duration(binary.BigEndian.Uint64(b[8:])), lifetime)
}

type server struct {
	tcp    net.Listener
	udp    *net.UDPConn
	counts *tallies
}

func newServer(addr netip.AddrPort, counts *tallies) (*server, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp4", addr.String())
	if err != nil {
		return nil, err
	}
	u, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &server{l, u, counts}, nil
}

func (s *server) close() error { return errors.Join(s.tcp.Close(), s.udp.Close()) }

// run serves until ctx ends.
func (s *server) run(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { s.close() })()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.datagrams(ctx, &wg) })
	for {
		c, err := s.tcp.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		wg.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			c.SetDeadline(time.Now().Add(lifetime))
			s.connection(c)
		})
	}
}

func (s *server) connection(c net.Conn) {
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return
	}
	switch b[0] {
	case closeByte:
		c.Write(b[:1])
	case echoByte:
		for {
			if _, err := c.Write(b[:1]); err != nil {
				return
			}
			if _, err := io.ReadFull(c, b[:1]); err != nil {
				return
			}
		}
	case sinkByte:
		if _, err := io.ReadFull(c, b[1:]); err == nil {
			id, length := parse(b[1:])
			sink(c, s.counts.of(id, length))
		}
	case sendByte:
		if _, err := io.ReadFull(c, b[1:]); err == nil {
			for buf := make([]byte, chunk); err == nil; {
				_, err = c.Write(buf)
			}
		}
	}
}

// sink counts what it reads until the window is over. It does not use TCPConn.WriteTo, whose splice(2) would measure
// something else than a reader. What is under way then is thrown away: it would load the next measurement.
func sink(c net.Conn, t *tally) {
	c.SetDeadline(t.end.Add(time.Second))
	for buf := make([]byte, chunk); ; {
		n, err := c.Read(buf)
		if err != nil || !t.add(n) {
			break
		}
	}
	c.(*net.TCPConn).SetLinger(0)
}

// datagrams serves UDP until the socket is closed.
func (s *server) datagrams(ctx context.Context, wg *sync.WaitGroup) {
	var t *tally // of the job that the last counted datagram belonged to
	var last uint64
	sends := map[netip.AddrPort]time.Time{} // until when
	for buf := make([]byte, 64<<10); ; {
		n, peer, err := s.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n == 0 {
			continue
		}
		switch buf[0] {
		case echoByte:
			s.udp.WriteToUDPAddrPort(buf[:n], peer)
		case sinkByte:
			if n < headerSize {
				continue
			}
			id, length := parse(buf[1:])
			if t == nil || id != last {
				t, last = s.counts.of(id, length), id
			}
			t.add(n)
		case sendByte:
			if n < headerSize || time.Now().Before(sends[peer]) {
				continue
			}
			_, length := parse(buf[1:])
			end := time.Now().Add(length)
			sends[peer] = end
			wg.Go(func() {
				for b := make([]byte, Datagram); time.Now().Before(end) && ctx.Err() == nil; {
					s.udp.WriteToUDPAddrPort(b, peer) // a full queue is the load's point
				}
			})
		}
	}
}
