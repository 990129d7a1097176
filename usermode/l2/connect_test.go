//go:build unix

package l2

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// serve serves one HTTP connection with a handler, whose result is sent on the channel.
func serve(t *testing.T, h func(w http.ResponseWriter, r *http.Request) (net.Conn, Options, error)) (client net.Conn, got <-chan connected) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	results := make(chan connected, 2)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, opts, err := h(w, r)
		results <- connected{c, opts, err}
	})}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c, results
}

type connected struct {
	conn net.Conn
	opts Options
	err  error
}

// TestNegotiate has both ends of ours, and frames right behind the last byte of the answer.
func TestNegotiate(t *testing.T) {
	client, got := serve(t, func(w http.ResponseWriter, r *http.Request) (net.Conn, Options, error) {
		c, opts, err := Connect(w, r, Csum|TSO4)
		if err == nil {
			_, err = Stream(c, opts).Send([]Frame{{Head: frame(guestMAC(1), gatewayMAC, 60, 1)}})
		}
		return c, opts, err
	})
	opts, err := Negotiate(client, "/connect", AllOffload)
	if err != nil {
		t.Fatal(err)
	}
	if opts.Framing != Usernet || opts.Takes != Csum|TSO4 {
		t.Errorf("agent has %s, gateway takes %q", opts.Framing, opts.Takes)
	}
	host := <-got
	if host.err != nil || host.opts.Framing != Usernet || host.opts.Takes != AllOffload {
		t.Errorf("gateway has %s, agent takes %q, %v", host.opts.Framing, host.opts.Takes, host.err)
	}
	l := Stream(client, opts)
	if frames, err := l.Receive(); err != nil || numberOf(frames[0]) != 1 {
		t.Errorf("the first frame: %v, %v", frames, err)
	}
	host.conn.Close()
}

// TestNegotiatePlain has gvproxy at the other end: it does not know the path, and answers nothing to the one it knows.
func TestNegotiatePlain(t *testing.T) {
	client, got := serve(t, func(w http.ResponseWriter, r *http.Request) (net.Conn, Options, error) {
		if r.URL.Path != "/connect" {
			http.NotFound(w, r)
			return nil, Options{}, nil
		}
		c, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			_, err = Stream(c, Options{}).Send([]Frame{{Head: frame(guestMAC(1), gatewayMAC, 60, 1)}})
		}
		return c, Options{}, err
	})
	opts, err := Negotiate(client, "/connect", AllOffload)
	if err != nil || opts.Framing != HyperKit || opts.Takes != 0 {
		t.Fatalf("%+v, %v", opts, err)
	}
	<-got
	host := <-got
	l := Stream(client, opts)
	if frames, err := l.Receive(); err != nil || numberOf(frames[0]) != 1 {
		t.Errorf("the first frame: %v, %v", frames, err)
	}
	host.conn.Close()
}

// TestGvforwarder writes its first frame in one piece with its request: gvproxy has lost it then.
func TestGvforwarder(t *testing.T) {
	client, got := serve(t, func(w http.ResponseWriter, r *http.Request) (net.Conn, Options, error) {
		return Connect(w, r, AllOffload)
	})
	f := Frame{Head: frame(gatewayMAC, guestMAC(1), 60, 7)}
	request := []byte("POST /connect HTTP/1.1\r\nHost: vsock\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\n\r\n")
	if _, err := client.Write(appendFrame(request, HyperKit, 0, &f)); err != nil {
		t.Fatal(err)
	}
	host := <-got
	if host.err != nil || host.opts.Framing != HyperKit || host.opts.Takes != 0 {
		t.Fatalf("%+v", host)
	}
	l := Stream(host.conn, host.opts)
	if frames, err := l.Receive(); err != nil || numberOf(frames[0]) != 7 {
		t.Errorf("the first frame: %v, %v", frames, err)
	}
	// And nothing is answered before the gateway's first frame.
	if _, err := l.Send([]Frame{{Head: frame(guestMAC(1), gatewayMAC, 60, 8)}}); err != nil {
		t.Fatal(err)
	}
	var length [2]byte
	if _, err := io.ReadFull(client, length[:]); err != nil || binary.LittleEndian.Uint16(length[:]) != 60 {
		t.Errorf("it gets %q, %v", length, err)
	}
	host.conn.Close()
}

func TestConnectRefuses(t *testing.T) {
	client, got := serve(t, func(w http.ResponseWriter, r *http.Request) (net.Conn, Options, error) { return Connect(w, r, 0) })
	if _, err := io.WriteString(client, "POST /connect/usernet HTTP/1.1\r\nHost: x\r\nUpgrade: usernet/9\r\nContent-Length: 0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil || resp.StatusCode != http.StatusUpgradeRequired {
		t.Errorf("%v, %v", resp, err)
	}
	if r := <-got; !errors.Is(r.err, errors.ErrUnsupported) || r.conn != nil {
		t.Errorf("%+v", r)
	}
}

// answer is a connection that answers with what it has.
type answer struct {
	io.Reader
	io.Writer
}

func TestNegotiateErrors(t *testing.T) {
	for _, tt := range []struct {
		name, answer string
		want         error
	}{
		{"nothing", "", io.ErrUnexpectedEOF},
		{"another protocol", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", ErrConnect},
		{"another status", "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", ErrConnect},
		{"the connection is used up", "HTTP/1.0 404 Not Found\r\n\r\nno", ErrConnect},
		{"a body that never ends", "HTTP/1.1 404 Not Found\r\nContent-Length: 999999999\r\n\r\n" + strings.Repeat("x", 2*maxAnswer), io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if opts, err := Negotiate(answer{strings.NewReader(tt.answer), io.Discard}, "/connect", 0); !errors.Is(err, tt.want) {
				t.Errorf("got %+v, %v, want %v", opts, err, tt.want)
			}
		})
	}
}

func FuzzNegotiate(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: usernet/1\r\nUsernet-Offload: csum, tso4\r\n\r\n\x00\x00"))
	f.Add([]byte("HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno\n<\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		opts, err := Negotiate(answer{bytes.NewReader(b), io.Discard}, "/connect", AllOffload)
		if err == nil && !bytes.HasSuffix(b, opts.Early) {
			t.Errorf("early bytes %q are not what follows the answer", opts.Early)
		}
		if err == nil && opts.Takes&(TSO4|TSO6) != 0 && opts.Takes&Csum == 0 {
			t.Errorf("takes %q", opts.Takes)
		}
	})
}

// hyperkit is HyperKit's part of the handshake.
func hyperkit(uuid string) []byte {
	b := append([]byte("VMN3T"), make([]byte, vpnkitInitLen-5)...)
	b = append(append(b, 1), uuid...)
	return append(b, make([]byte, vpnkitInitLen+vpnkitCommandLen-len(b))...)
}

const machine = "c3d68012-0208-11ea-9fd7-f2189899ab08"

func TestHandshakeVPNKit(t *testing.T) {
	f := Frame{Head: frame(gatewayMAC, guestMAC(1), 60, 5)}
	client := appendFrame(hyperkit(machine), HyperKit, 0, &f)
	in := bytes.NewReader(client)
	var out bytes.Buffer
	m, err := HandshakeVPNKit(answer{in, &out}, 1500, func(uuid string) (MAC, error) {
		if uuid != machine {
			t.Errorf("machine %q", uuid)
		}
		return guestMAC(1), nil
	})
	if err != nil || m != guestMAC(1) {
		t.Fatalf("%s, %v", m, err)
	}
	want := append(bytes.Clone(client[:vpnkitInitLen]), 1, 0xdc, 0x05, 0xea, 0x05)
	want = append(append(want, m[:]...), make([]byte, vpnkitReplyLen-11)...)
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("answers %x", out.Bytes())
	}
	if frames, err := newStreamReader(in, Options{}).receive(); err != nil || numberOf(frames[0]) != 5 {
		t.Errorf("the first frame: %v, %v", frames, err)
	}
	unknown := errors.New("unknown")
	if _, err := HandshakeVPNKit(answer{bytes.NewReader(client), io.Discard}, 1500, func(string) (MAC, error) { return MAC{}, unknown }); !errors.Is(err, unknown) {
		t.Errorf("an unknown machine: %v", err)
	}
}

func FuzzHandshakeVPNKit(f *testing.F) {
	f.Add(hyperkit(machine))
	f.Add([]byte("VMN3T"))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		var out bytes.Buffer
		_, err := HandshakeVPNKit(answer{in, &out}, 65535, func(uuid string) (MAC, error) {
			if len(uuid) != vpnkitUUIDLen {
				t.Errorf("machine %q", uuid)
			}
			return guestMAC(1), nil
		})
		if err == nil && (len(b)-in.Len() != vpnkitInitLen+vpnkitCommandLen || out.Len() != vpnkitInitLen+vpnkitReplyLen) {
			t.Errorf("read %d, wrote %d", len(b)-in.Len(), out.Len())
		}
		if err != nil && len(b) >= vpnkitInitLen+vpnkitCommandLen {
			t.Error(err)
		}
	})
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return r, w
}

// TestStdio has a guest on two pipes, as gvproxy -listen-stdio.
func TestStdio(t *testing.T) {
	hostIn, guestOut := pipe(t)
	guestIn, hostOut := pipe(t)
	l, err := Stdio(hostIn, hostOut, Options{})
	if err != nil {
		t.Fatal(err)
	}
	sw := NewSwitch(Config{GatewayMAC: gatewayMAC})
	ctx, cancel := context.WithCancel(t.Context())
	p, ended := sw.NewPort(l, PortConfig{}), make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	me := Files(guestIn, guestOut, Options{})
	if _, err := me.Send([]Frame{{Head: frame(gatewayMAC, guestMAC(1), 60, 1)}}); err != nil {
		t.Fatal(err)
	}
	for len(sw.Table()) == 0 {
		time.Sleep(time.Millisecond)
	}
	sw.Send([]Frame{{Head: frame(guestMAC(1), gatewayMAC, 60, 2)}})
	if frames, err := me.Receive(); err != nil || numberOf(frames[0]) != 2 {
		t.Errorf("%v, %v", frames, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestCapture reads back what was captured.
func TestCapture(t *testing.T) {
	b := newBed(t, Config{Gateway: &gateway{}})
	one := b.stream(1, Options{}, PortConfig{})
	var file bytes.Buffer
	c := NewCapture(&file)
	b.sw.Capture(c)
	start := time.Now().Truncate(time.Second)
	one.say(gatewayMAC, 1)
	b.until(func() bool { return one.port.Stats().RxFrames == 1 })
	b.sw.Send([]Frame{{Head: frame(one.mac, gatewayMAC, 30, 2)[:20], Tail: [][]byte{make([]byte, 1000)}}})
	one.hears(2)
	b.sw.Capture(nil)
	one.say(gatewayMAC, 3)
	b.until(func() bool { return one.port.Stats().RxFrames == 2 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Run(ctx); err != nil { // what was left is not there any more
		t.Fatal(err)
	}
	le := binary.LittleEndian
	got := file.Bytes()
	if len(got) != 24+2*pcapRecord+60+1020 || le.Uint32(got) != 0xa1b23c4d || le.Uint32(got[20:]) != 1 {
		t.Fatalf("%d bytes: %x", len(got), got[:min(24, len(got))])
	}
	for i, want := range []uint32{60, 1020} {
		rec := got[24+i*(pcapRecord+60):]
		if n := le.Uint32(rec[8:]); n != want || le.Uint32(rec[12:]) != want {
			t.Errorf("record %d has %d bytes, want %d", i, n, want)
		}
		if at := time.Unix(int64(le.Uint32(rec)), int64(le.Uint32(rec[4:]))); at.Before(start) || at.After(time.Now()) {
			t.Errorf("record %d is of %v", i, at)
		}
		if n := binary.BigEndian.Uint32(rec[pcapRecord+headerLen:]); n != uint32(i+1) {
			t.Errorf("record %d is frame %d", i, n)
		}
	}
	for range captureSize/1514 + 2 {
		c.record([]Frame{{Head: make([]byte, 1514)}})
	}
	if c.Dropped() == 0 || len(c.pending) > captureSize {
		t.Errorf("%d dropped, %d bytes wait", c.Dropped(), len(c.pending))
	}
}
