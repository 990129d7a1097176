package publish

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/usernet/usernet/vsock/proxy"
)

// The host and the guest of a benchmark are processes of their own, this very program run again, as they are in use: what they share of
// the runtime with each other and with the load would be measured too.

// endArgs holds the arguments of such a process: WHO PATH WHAT, see ends. It prints a line when it is ready, and ends with its standard
// input.
const endArgs = "USERNET_TEST_END"

var ends = map[string]func(path, what string) (said string, err error){
	"bare-guest":      bareGuest,
	"bare-host":       bareHost,
	"published-host":  publishedHost,
	"published-guest": publishedGuest,
}

func init() {
	f := strings.Fields(os.Getenv(endArgs))
	if len(f) == 0 {
		return
	}
	said, err := ends[f[0]](f[1], f[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(said)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// startEnd starts one of ends until the benchmark is over, and returns what it said.
func startEnd(b *testing.B, who, path, what string) string {
	b.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), endArgs+"="+who+" "+path+" "+what)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	said, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatalf("%s: %v", who, err)
	}
	return strings.TrimSpace(said)
}

// acceptAll has serve serve what l accepts, for ever.
func acceptAll(l net.Listener, serve func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

func bareGuest(path, what string) (string, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", err
	}
	go acceptAll(l, guestEnds[what])
	return "ready", nil
}

// bareHost is the least that can be done: a listener, a unix socket dialled for each connection, and io.Copy both ways.
func bareHost(path, _ string) (string, error) {
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	l, err := cfg.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go acceptAll(l, func(client net.Conn) {
		guest, err := net.Dial("unix", path)
		if err != nil {
			return
		}
		defer guest.Close()
		var up sync.WaitGroup
		up.Go(func() { io.Copy(guest, client); guest.(*net.UnixConn).CloseWrite() })
		io.Copy(client, guest)
		client.(*net.TCPConn).CloseWrite()
		up.Wait()
	})
	return l.Addr().String(), nil
}

func publishedHost(path, _ string) (string, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", err
	}
	s := NewServer(ServerConfig{Log: slog.New(slog.DiscardHandler)})
	go http.Serve(l, s)
	return "ready", nil
}

func publishedGuest(path, what string) (string, error) {
	c := NewClient(ClientConfig{
		Dial: func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", path) },
		Name: path, Log: slog.New(slog.DiscardHandler),
	})
	go c.Run(context.Background())
	w, err := c.Publish(context.Background(), tcp(0), func(_ proxy.Header, conn net.Conn) {
		go func() {
			defer conn.Close()
			guestEnds[what](conn)
		}()
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("127.0.0.1:%d", w.HostPort()), nil
}
