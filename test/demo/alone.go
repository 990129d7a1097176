package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// demoPort is the host's port that the demo publishes. It is free on most machines; where it is not, usernet says so.
const demoPort = "127.0.0.1:18080"

// aloneDemo is a demo of usernet run. Its servers run until it ends.
type aloneDemo struct {
	demo
	dir     string
	servers []*exec.Cmd
}

// alone shows commands on networks of their own.
func alone(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "usernet-demo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := &aloneDemo{demo: demo{ctx: ctx}, dir: dir}
	fmt.Printf("Commands on networks of their own, as the user %d: no engine, and nothing on the host is changed.\n", os.Getuid())
	d.build("usernet", "./cmd/usernet")
	d.build("probe", "./test/cmd/probe")
	before, err := links()
	if err != nil {
		return err
	}

	d.heading("A web server whose port is published on the host")
	d.serve("-p", demoPort+":80", "--", "probe", "serve")
	d.page("the host", demoPort, func() (string, error) { return get(ctx, "http://"+demoPort+"/") })

	d.heading("Two commands that share a network and find each other by name")
	d.serve("-share", "demo", "-name", "web", "--", "probe", "serve")
	d.run("-share", "demo", "--", "probe", "fetch", "http://web/")

	d.heading("A command that is to reach nothing")
	d.refused("-no-egress", "--", "probe", "fetch", "http://203.0.113.1/")

	d.heading("Clean up")
	d.stop()
	if d.err == nil {
		d.err = nothingLeftOf(before)
	}
	return d.err
}

func (d *aloneDemo) build(name, from string) {
	if d.err != nil {
		return
	}
	cmd := exec.CommandContext(d.ctx, "go", "build", "-o", filepath.Join(d.dir, name), from)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	d.err = cmd.Run()
}

// command is usernet run with the arguments.
func (d *aloneDemo) command(args []string) *exec.Cmd {
	cmd := exec.CommandContext(d.ctx, filepath.Join(d.dir, "usernet"), append([]string{"run"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), "PATH="+d.dir+":"+os.Getenv("PATH"))
	return cmd
}

// serve starts a command that stays.
func (d *aloneDemo) serve(args ...string) {
	if d.err != nil {
		return
	}
	d.prompt(args)
	cmd := d.command(args)
	cmd.Stderr = os.Stderr
	if d.err = cmd.Start(); d.err == nil {
		d.servers = append(d.servers, cmd)
	}
}

func (d *aloneDemo) prompt(args []string) { fmt.Println("\n$ usernet run " + strings.Join(args, " ")) }

// run shows a command and what it prints. The server that it asks may still be starting.
func (d *aloneDemo) run(args ...string) {
	if d.err != nil {
		return
	}
	d.prompt(args)
	var out []byte
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, d.err = d.command(args).CombinedOutput()
		if d.err == nil || time.Now().After(deadline) {
			break
		}
	}
	d.print(string(out))
}

// refused shows a command that must fail.
func (d *aloneDemo) refused(args ...string) {
	if d.err != nil {
		return
	}
	d.prompt(args)
	out, err := d.command(args).CombinedOutput()
	d.print(string(out))
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
		d.err = fmt.Errorf("the command should have failed, and: %v", err)
	}
}

// stop ends the servers, even after something has failed.
func (d *aloneDemo) stop() {
	for _, cmd := range d.servers {
		cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, cmd := range d.servers {
		err := cmd.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() <= 0 {
			err = nil // by the signal
		}
		d.err = errors.Join(d.err, err)
	}
}

// links are the names of the host's network interfaces.
func links() (string, error) {
	all, err := net.Interfaces()
	var names []string
	for _, l := range all {
		names = append(names, l.Name)
	}
	return strings.Join(names, " "), err
}

func nothingLeftOf(before string) error {
	after, err := links()
	if err != nil {
		return err
	}
	if after != before {
		return fmt.Errorf("the host's interfaces were %s and are %s", before, after)
	}
	l, err := net.Listen("tcp", demoPort)
	if err != nil {
		return fmt.Errorf("the published port is not free again: %w", err)
	}
	l.Close()
	fmt.Println("\nNothing is left: the host's interfaces and ports are as before.")
	return nil
}

func get(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}
