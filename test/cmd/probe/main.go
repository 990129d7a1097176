// Probe is the program in the test image: the servers that tests publish, and the clients that they run in containers.
//
//	probe serve [PORT...]      HTTP on the ports (80), TCP echo on 7, UDP answers on 7 and on the ports
//	probe fetch URL            prints the page
//	probe tcp ADDRESS          copies standard input there and what comes back to standard output
//	probe udp ADDRESS TEXT     prints the answer
//	probe resolve NAME [tcp]   prints the addresses, one a line, sorted; of an address the names
//	probe hold ADDRESS         exchanges a line every 50 ms over one connection after another; prints what happens
//	probe bulk ADDRESS BYTES   sends so many bytes to an echo server and checks what comes back
//
// Clients give up after 5 s, or what PROBE_PATIENCE says, and end with status 1.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"syscall"
	"time"
)

var patience = 5 * time.Second

var commands = map[string]func(args []string) error{
	"serve": serve, "fetch": fetch, "tcp": tcp, "udp": udp, "resolve": resolve, "hold": hold, "bulk": bulk,
}

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: probe serve|fetch|tcp|udp|resolve|hold|bulk ...")
		os.Exit(2)
	}
	if d, err := time.ParseDuration(os.Getenv("PROBE_PATIENCE")); err == nil {
		patience = d
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func serve(ports []string) error {
	if len(ports) == 0 {
		ports = []string{"80"}
	}
	for _, port := range ports {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			return err
		}
		go http.Serve(l, http.HandlerFunc(page))
	}
	for _, port := range append(ports, "7") {
		c, err := net.ListenPacket("udp", ":"+port)
		if err != nil {
			return err
		}
		go answer(c)
	}
	l, err := net.Listen("tcp", ":7")
	if err != nil {
		return err
	}
	go echo(l)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	<-stop
	return nil
}

func page(w http.ResponseWriter, r *http.Request) {
	name, _ := os.Hostname()
	fmt.Fprintf(w, "hello from %s\npeer %s\nlocal %s\n", name, plain(r.RemoteAddr),
		plain(r.Context().Value(http.LocalAddrContextKey).(net.Addr).String()))
}

func plain(addr string) string {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return addr
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

func answer(c net.PacketConn) {
	b := make([]byte, 64<<10)
	for {
		n, peer, err := c.ReadFrom(b)
		if err != nil {
			continue
		}
		c.WriteTo(fmt.Appendf(nil, "peer %s %s", plain(peer.String()), b[:n]), peer)
	}
}

func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

func fetch(args []string) error {
	c := http.Client{Timeout: patience}
	resp, err := c.Get(args[0])
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(os.Stdout, resp.Body)
	return err
}

func dial(network, addr string) (net.Conn, error) {
	return net.DialTimeout(network, addr, patience)
}

func tcp(args []string) error {
	c, err := dial("tcp", args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.Copy(c, os.Stdin); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, c)
	return err
}

func udp(args []string) error {
	c, err := dial("udp", args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 64<<10)
	for range 3 { // a datagram may be lost
		if _, err = c.Write([]byte(args[1])); err != nil {
			continue
		}
		c.SetReadDeadline(time.Now().Add(patience / 3))
		var n int
		if n, err = c.Read(b); err == nil {
			fmt.Printf("%s\n", b[:n])
			return nil
		}
	}
	return err
}

func resolve(args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var r net.Resolver
	if len(args) > 1 {
		r.Dial = func(ctx context.Context, _, server string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, args[1], server)
		}
	}
	lookup := r.LookupHost
	if _, err := netip.ParseAddr(args[0]); err == nil {
		lookup = r.LookupAddr
	}
	found, err := lookup(ctx, args[0])
	if err != nil {
		return err
	}
	slices.Sort(found)
	for _, f := range found {
		fmt.Println(f)
	}
	return nil
}

// hold never gives up: the test that starts it ends it.
func hold(args []string) error {
	for {
		n, err := exchange(args[0])
		say("lost after %d exchanges: %v", n, err)
		time.Sleep(50 * time.Millisecond)
	}
}

func say(format string, args ...any) {
	fmt.Printf("%s %s\n", time.Now().Format(time.RFC3339Nano), fmt.Sprintf(format, args...))
}

func exchange(addr string) (n int, err error) {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	say("connected")
	b := make([]byte, 16)
	for ; ; n++ {
		c.SetDeadline(time.Now().Add(time.Second))
		if _, err := c.Write(b); err != nil {
			return n, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return n, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func bulk(args []string) error {
	size, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	c, err := dial("tcp", args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(12 * patience))
	var seed [32]byte
	copy(seed[:], args[0])
	want := sha256.New()
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(io.MultiWriter(c, want), rand.NewChaCha8(seed), int64(size))
		sent <- err
	}()
	got := sha256.New()
	if n, err := io.CopyN(got, c, int64(size)); err != nil {
		return fmt.Errorf("got %d of %d bytes: %w", n, size, err)
	}
	if err := <-sent; err != nil {
		return err
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return fmt.Errorf("%d bytes came back changed", size)
	}
	fmt.Printf("%d bytes came back\n", size)
	return nil
}
