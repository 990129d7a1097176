package console

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// machine is a client whose guest is this process. off ends the serial port, as the end of QEMU does.
func machine(t *testing.T) (c *Client, off func()) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "port"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	guest, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	host, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c = NewClient(host)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := Serve(guest); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := c.Run(context.Background()); err != nil {
			t.Error(err)
		}
	})
	off = func() {
		guest.Close()
		wg.Wait()
		host.Close()
	}
	t.Cleanup(off)
	if err := c.Up(soon(t)); err != nil {
		t.Fatal(err)
	}
	return c, off
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func sh(script string) Command { return Command{Args: []string{"sh", "-c", script}} }

func TestDo(t *testing.T) {
	c, _ := machine(t)
	for _, tt := range []struct {
		name    string
		command Command
		out     string
		err     string // in the error's text; "": none
	}{
		{"output", sh("echo a; echo b"), "a\nb", ""},
		{"environment", Command{Args: []string{"sh", "-c", "echo $COLOUR"}, Env: []string{"COLOUR=red"}}, "red", ""},
		{"status", sh("echo a; echo no >&2; exit 3"), "a", "exit status 3: no"},
		{"signal", sh("kill -9 $$"), "", "signal: killed"},
		{"not there", Command{Args: []string{"/nonexistent/program"}}, "", "no such file"},
		{"bytes", sh(`printf '\377'`), "\xff", ""},
		{"left behind", sh("sleep 5 & echo a"), "a", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := c.Do(soon(t), tt.command)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if out != tt.out {
				t.Errorf("printed %q, want %q", out, tt.out)
			}
		})
	}
}

func TestSideBySide(t *testing.T) {
	c, _ := machine(t)
	log := filepath.Join(t.TempDir(), "log")
	slow, err := c.Start(soon(t), Command{Args: []string{"sh", "-c", "echo started; exec sleep 60"}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := c.Do(soon(t), sh("echo quick")); err != nil || out != "quick" {
		t.Errorf("printed %q, %v", out, err)
	}
	select {
	case <-slow.Ended():
		t.Error("it ended by itself")
	default:
	}
	if err := slow.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if _, err := slow.Wait(soon(t)); !errors.Is(err, ErrCommand) || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("error %v", err)
	}
	if err := slow.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("signal to what has ended: %v", err)
	}
	if text, err := os.ReadFile(log); err != nil || len(text) > 0 && string(text) != "started\n" {
		t.Errorf("the log has %q, %v", text, err)
	}
}

// A command whose caller gives up ends.
func TestTimeout(t *testing.T) {
	c, _ := machine(t)
	p, err := c.Start(soon(t), sh("exec sleep 60"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if _, err := p.Wait(soon(t)); !errors.Is(err, ErrCommand) {
		t.Errorf("error %v", err)
	}
}

// When the machine goes, nobody waits for it.
func TestMachineEnds(t *testing.T) {
	c, off := machine(t)
	p, err := c.Start(soon(t), sh("exec sleep 60"))
	if err != nil {
		t.Fatal(err)
	}
	off()
	if _, err := p.Wait(soon(t)); !errors.Is(err, ErrEnded) {
		t.Errorf("wait: %v", err)
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("signal: %v", err)
	}
	if _, err := c.Start(soon(t), sh("true")); !errors.Is(err, ErrEnded) {
		t.Errorf("start: %v", err)
	}
}
