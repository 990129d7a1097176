// Package load is loads on TCP for tests and benchmarks. What drives them, and what serves them, are processes of their own, the test's
// very program run again: what is under test shares its runtime with nobody, as in the daemon, and a profile shows it alone.
package load

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/usernet/usernet/internal/netns"
)

// argsVar holds the arguments of such a process: serve ADDR | drive ADDR KIND SECONDS STREAMS | hold ADDR COUNT | one of further's.
const argsVar = "USERNET_TEST_AGENT"

// Init is for an init function of the test. In a process that Start has started it does what that one is for, and does not return; in others it
// does nothing. further are other things that there are to do, by name, with their arguments.
func Init(further map[string]func(args []string) error) {
	args := strings.Fields(os.Getenv(argsVar))
	if len(args) == 0 {
		return
	}
	go func() { // ends with its parent
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	do := further[args[0]]
	if do == nil {
		do = func([]string) error { return run(args) }
	}
	if err := do(args[1:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(args []string) error {
	switch args[0] {
	case "serve":
		return serve(args[1])
	case "drive":
		seconds, err := strconv.ParseFloat(args[3], 64)
		if err != nil {
			return err
		}
		streams, err := strconv.Atoi(args[4])
		if err != nil {
			return err
		}
		return drive(args[1], args[2], time.Duration(seconds*float64(time.Second)), streams)
	case "hold":
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return hold(args[1], n)
	}
	return fmt.Errorf("no agent %q", args)
}

// Process is one that Start has started.
type Process struct {
	*os.Process
	Stop func() // ends it, and returns when it has ended

	t   testing.TB
	out *bufio.Scanner
}

// Start starts a process in ns, or beside the test if that is nil, with files as descriptors from 3 on. It ends with the test at the latest.
func Start(t testing.TB, ns *netns.NS, files []*os.File, args ...any) *Process {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), argsVar+"="+strings.TrimSpace(fmt.Sprintln(args...)))
	cmd.ExtraFiles = files
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	start := cmd.Start
	if ns != nil {
		start = func() error { return ns.Do(cmd.Start) }
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		in.Close()
		cmd.Wait()
	})
	t.Cleanup(stop)
	return &Process{Process: cmd.Process, Stop: stop, t: t, out: bufio.NewScanner(out)}
}

// Line waits for the next line that the process prints.
func (p *Process) Line() string {
	p.t.Helper()
	if !p.out.Scan() {
		p.t.Fatalf("agent says nothing: %v", p.out.Err())
	}
	return p.out.Text()
}
