package vsock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hypervisor accepts at path and gives each connection to answer, one after the other, with the first line that came.
func hypervisor(t testing.TB, path string, answer func(conn net.Conn, line string)) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var line []byte
			for b := make([]byte, 1); !bytes.HasSuffix(line, []byte("\n")); line = append(line, b[0]) {
				if _, err := conn.Read(b); err != nil {
					break
				}
			}
			answer(conn, string(line))
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
}

// TestHybrid has a machine with an echo on port 52 and nothing else, behind a hypervisor that sends the guest's first
// bytes together with its reply.
func TestHybrid(t *testing.T) {
	noLeaks(t)
	path := filepath.Join(t.TempDir(), "vm.vsock")
	hypervisor(t, path, func(conn net.Conn, line string) {
		if line == "CONNECT 52\n" {
			io.WriteString(conn, "OK 1073741824\nhello ")
			io.Copy(conn, conn)
		}
	})
	conn := dial(t, "hybrid://"+path+":52")
	if _, ok := conn.(*net.UnixConn); !ok {
		t.Errorf("the connection is a %T: splice(2) wants a *net.UnixConn", conn)
	}
	talk(t, conn)
	conn.Close()

	_, err := Dial(soon(t), mustParse(t, "hybrid://"+path+":53"))
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "the hypervisor hung up") {
		t.Errorf("a port without a listener: %v", err)
	}
	stale(t, path+"2")
	if _, err := Dial(soon(t), mustParse(t, "hybrid://"+path+"2:52")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("without a hypervisor: %v", err)
	}
}

// TestHybridSplice moves a connection to TCP as a relay does, and expects it whole.
func TestHybridSplice(t *testing.T) {
	noLeaks(t)
	const size = 8 << 20
	path := filepath.Join(t.TempDir(), "vm.vsock")
	want := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	hypervisor(t, path, func(conn net.Conn, line string) {
		conn.Write(append([]byte("OK 1\n"), want...))
	})
	l := listen(t, "tcp://127.0.0.1:0")
	got := make(chan []byte)
	go func() {
		defer close(got)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		all, _ := io.ReadAll(conn)
		got <- all
	}()
	out := dial(t, "tcp://"+l.Addr().String())
	if _, err := io.Copy(out, dial(t, "hybrid://"+path+":52")); err != nil {
		t.Error(err)
	}
	out.Close()
	if all := <-got; !bytes.Equal(all, want) {
		t.Errorf("%d bytes arrived, want %d, or others", len(all), len(want))
	}
	<-got
}

// TestHybridHostile has hypervisors that do not keep to the protocol. Each is given up without a leak.
func TestHybridHostile(t *testing.T) {
	noLeaks(t)
	for _, tt := range []struct {
		name, want string
		answer     func(conn net.Conn, line string)
	}{
		{"garbage", `replies "\x00\x01", want OK`, func(conn net.Conn, _ string) { io.WriteString(conn, "\x00\x01\nOK 1\n") }},
		{"a line without end", "has no end", func(conn net.Conn, _ string) {
			for {
				if _, err := io.WriteString(conn, "OK 1111111111111111111111"); err != nil {
					return
				}
			}
		}},
		{"an end in the line", `ends after "OK 10"`, func(conn net.Conn, _ string) { io.WriteString(conn, "OK 10") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "vm.vsock")
			hypervisor(t, path, tt.answer)
			_, err := Dial(soon(t), mustParse(t, "hybrid://"+path+":52"))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
	for _, tt := range []struct{ name, reply string }{{"silence", ""}, {"half a line", "OK 1"}} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "vm.vsock")
			gone := make(chan error, 1)
			asked := make(chan struct{})
			hypervisor(t, path, func(conn net.Conn, _ string) {
				io.WriteString(conn, tt.reply)
				close(asked)
				_, err := conn.Read(make([]byte, 1)) // until the caller has gone
				gone <- err
			})
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-asked
				cancel()
			}()
			if _, err := Dial(ctx, mustParse(t, "hybrid://"+path+":52")); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v, want that of the context", err)
			}
			if err := <-gone; err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the hypervisor sees %v, want the connection's end", err)
			}
		})
	}
}

// TestHybridOutlives: a connection is not bound to the context that it was dialled with.
func TestHybridOutlives(t *testing.T) {
	noLeaks(t)
	path := filepath.Join(t.TempDir(), "vm.vsock")
	hypervisor(t, path, func(conn net.Conn, _ string) {
		io.WriteString(conn, "OK 1\nhello ")
		io.Copy(conn, conn)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	conn, err := Dial(ctx, mustParse(t, "hybrid://"+path+":52"))
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	talk(t, conn)
}

// TestHybridListen makes the guest's call as the hypervisor does.
func TestHybridListen(t *testing.T) {
	noLeaks(t)
	path := filepath.Join(t.TempDir(), "vm.vsock")
	echo(t, listen(t, "hybrid://"+path+":1024"))
	talk(t, dial(t, "unix://"+path+"_1024"))
}

func TestHyperKit(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	hypervisor(t, filepath.Join(dir, "connect"), func(conn net.Conn, line string) {
		fmt.Fprint(conn, "hello ")
		if line != "00000003.00000400\n" {
			fmt.Fprintf(conn, "%q", line)
		}
		io.Copy(conn, conn)
	})
	url := "vsock://null:1024" + dir
	talk(t, dial(t, url))

	echo(t, listen(t, url))
	talk(t, dial(t, "unix://"+dir+"/00000002.00000400"))
	if _, err := os.Stat(filepath.Join(dir, "connect")); err != nil {
		t.Error(err) // it is HyperKit's
	}
}
