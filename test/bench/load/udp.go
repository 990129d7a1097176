package load

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

func dialUDP(j Job) (*net.UDPConn, error) {
	return net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(j.Addr))
}

// udpUp sends for a little longer than the serving end counts. A write that fails, for a queue that is full or a
// forwarder that says so by ICMP, is a lost datagram.
func udpUp(j Job) (r Result, err error) {
	c, err := dialUDP(j)
	if err != nil {
		return r, err
	}
	defer c.Close()
	b := make([]byte, Datagram)
	copy(b, header(sinkByte, j))
	start := time.Now()
	for end := start.Add(j.Length + 50*time.Millisecond); time.Now().Before(end); {
		if n, err := c.Write(b); err == nil {
			r.Done++
			r.Bytes += int64(n)
		}
	}
	r.Elapsed = time.Since(start)
	return r, nil
}

// udpDown asks until the first datagram comes and counts from then on.
func udpDown(j Job) (r Result, err error) {
	c, err := dialUDP(j)
	if err != nil {
		return r, err
	}
	defer c.Close()
	ask := header(sendByte, Job{ID: j.ID, Length: j.Length + 100*time.Millisecond})
	b := make([]byte, 2*Datagram)
	for range 10 {
		c.Write(ask)
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err = c.Read(b); err == nil {
			break
		}
	}
	if err != nil {
		return r, fmt.Errorf("nothing arrived: %w", err)
	}
	c.SetReadDeadline(time.Now().Add(j.Length))
	for {
		n, err := c.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err == nil {
			r.Done++
			r.Bytes += int64(n)
		}
	}
	r.Elapsed = j.Length
	return r, nil
}

// udpExchange keeps j.Streams datagrams of one socket under way: each that comes back sends the next. After a silence
// all count as lost and are sent anew. The times of round trips mean something for one datagram at a time only.
func udpExchange(j Job) (Result, error) {
	c, err := dialUDP(j)
	if err != nil {
		return Result{}, err
	}
	defer c.Close()
	b, in := make([]byte, small), make([]byte, Datagram)
	b[0] = echoByte
	var trips []time.Duration
	start := time.Now()
	end := start.Add(j.Length)
	for sent := start; sent.Before(end); sent = time.Now() {
		for range max(j.Streams, 1) {
			c.Write(b)
		}
		for sent.Before(end) {
			c.SetReadDeadline(sent.Add(200 * time.Millisecond))
			if _, err = c.Read(in); err != nil {
				break
			}
			now := time.Now()
			trips = append(trips, now.Sub(sent))
			sent = now
			c.Write(b)
		}
	}
	if len(trips) == 0 {
		return Result{}, fmt.Errorf("no answer: %w", err)
	}
	return timed(trips, start), nil
}
