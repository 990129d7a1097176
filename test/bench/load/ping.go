package load

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// ping sends echo requests, each when the one before was answered, from a raw socket.
func ping(j Job) (Result, error) {
	c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return Result{}, err
	}
	defer c.Close()
	start := time.Now()
	end := start.Add(j.Length)
	to := &net.IPAddr{IP: j.Addr.Addr().AsSlice()}
	var trips []time.Duration
	for seq := 1; seq < 1<<16 && (seq == 1 || time.Now().Before(end)); seq++ {
		sent := time.Now()
		if err := echo(c, to, seq); err != nil {
			return Result{}, fmt.Errorf("echo %d: %w", seq, err)
		}
		trips = append(trips, time.Since(sent))
	}
	return timed(trips, start), nil
}

// echo sends one request and waits for its reply.
func echo(c *icmp.PacketConn, to net.Addr, seq int) error {
	id := os.Getpid() & 0xffff
	m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: seq, Data: make([]byte, 56)}}
	b, err := m.Marshal(nil)
	if err != nil {
		return err
	}
	if _, err := c.WriteTo(b, to); err != nil {
		return err
	}
	c.SetReadDeadline(time.Now().Add(time.Second))
	for buf := make([]byte, 1500); ; {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		m, err := icmp.ParseMessage(1, buf[:n]) // 1 is ICMP's protocol number
		if err != nil {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && m.Type == ipv4.ICMPTypeEchoReply && e.ID == id && e.Seq == seq {
			return nil
		}
	}
}
