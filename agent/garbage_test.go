package agent

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/usernet/usernet/usermode/l2"
)

// TestGarbage has the agent survive gateways that say anything, one after the other, and take the network of the one that comes last.
func TestGarbage(t *testing.T) {
	noLeaks(t)
	const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: usernet/1\r\nUsernet-Offload: csum, tso4, tso6\r\n\r\n"
	ether := string(guestMAC[:]) + "\x02\x00\x00\x00\x00\x01\x08\x00"
	frame := func(virtio, frame string) string {
		n := len(virtio) + len(frame)
		return string([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}) + virtio + frame
	}
	plain := strings.Repeat("\x00", l2.VirtioLen)
	answers := []string{
		"",
		"\x00",
		"SSH-2.0-OpenSSH\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\n12",
		"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
		strings.Repeat("x", 200<<10),
		switching,
		switching + "\xff\xff\xff\xff",
		switching + "\x00\x00\x00\x01x",
		switching + frame(plain, ether+"\x45") + frame(plain, ether+strings.Repeat("\x60", 100)),
		switching + frame(plain, ether+strings.Repeat("\xff", 65535)),
		switching + frame("\x01\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", ether+strings.Repeat("x", 2000)),
		switching + frame("\x01\x05\x00\x00\x00\x02\x22\x00\x06\x00\x00\x00", ether+strings.Repeat("x", 2000)),
		switching + frame("\x01\x00\x00\x00\x00\x00\x2e\x00\x10\x00\x00\x00", ether+strings.Repeat("x", 50)),
		switching + strings.Repeat("\x00", 4096),
	}
	h := newHost(t)
	cfg := h.config()
	cfg.Wait, cfg.MaxWait = time.Millisecond, time.Millisecond
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := run(t, cfg)
	for i, text := range answers {
		l.SetDeadline(time.Now().Add(eventually))
		conn, err := l.AcceptUnix()
		if err != nil {
			t.Fatalf("before answer %d: %v", i, err)
		}
		if err := say(conn, text); err != nil {
			t.Errorf("answer %d: %v", i, err)
		}
	}
	l.Close()
	h.serve()
	h.dhcp()
	r.await()
	tcp := listenTCP(t, h.ns, gatewayIP.String()+":0")
	exchange(t, tcp, tcp.Addr().String(), 1<<20)
}

// say answers the agent's request by a text, ends the connection, and hears it out.
func say(conn *net.UnixConn, text string) error {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(eventually))
	r := bufio.NewReader(conn)
	req, err := http.ReadRequest(r)
	if err != nil {
		return err
	}
	req.Body.Close()
	var g errgroup.Group
	g.Go(func() error {
		conn.Write([]byte(text)) // the agent may hang up before the end
		return conn.CloseWrite()
	})
	_, err = io.Copy(io.Discard, r)
	g.Wait()
	if errors.Is(err, syscall.ECONNRESET) {
		return nil // it has not read all that was said
	}
	return err
}
