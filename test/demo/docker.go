package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
)

// engineDemo is a demo on an engine.
type engineDemo struct {
	demo
	*engine.Engine
}

// docker shows networks of both kinds on a private engine.
func docker(ctx context.Context) (err error) {
	fmt.Println("Starting a private Docker engine on a pretend host, with usernet beside it ...")
	e, err := engine.New(ctx, engine.Docker20())
	if err != nil {
		return err
	}
	defer func() {
		if cerr := e.Close(); err == nil {
			err = cerr
		}
	}()
	if err := e.StartUsernet(ctx); err != nil {
		return err
	}
	before, err := e.Snapshot(ctx)
	if err != nil {
		return err
	}
	d := &engineDemo{demo: demo{ctx: ctx}, Engine: e}
	version := d.quiet("version", "--format", "{{.Server.Version}}")
	fmt.Printf("Docker %s runs; the host is %s, a client outside is %s.\n", version, engine.HostAddr.Addr(), engine.RouterAddr.Addr())
	d.show("web", "8080", "-d", "usernet")
	d.show("classic", "8081", "-d", "usernet", "-o", "mode=bridge")
	d.heading("Both are still there: docker ps cannot show ports of any driver but Docker's own, usernet ps does")
	d.usernet("ps")
	d.heading("Clean up")
	d.docker("rm", "-f", "www-web", "www-classic")
	d.docker("network", "rm", "web", "classic")
	if d.err == nil {
		d.err = nothingLeft(ctx, e, before)
	}
	return d.err
}

// nothingLeft compares the host with what it was before the first network.
func nothingLeft(ctx context.Context, e *engine.Engine, before engine.Snapshot) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		after, err := e.Snapshot(ctx)
		if err != nil {
			return err
		}
		left := before.Diff(after)
		if left == "" {
			fmt.Println("\nNothing is left: links, namespaces, rules, ports and routes of the host are as before.")
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("left behind:\n%s", left)
		}
	}
}

// show makes a network and puts it through its paces.
func (d *engineDemo) show(network, port string, create ...string) {
	d.heading("A network: docker network create " + strings.Join(create, " "))
	d.docker(append(append([]string{"network", "create"}, create...), network)...)
	www := "www-" + network
	d.docker("run", "-d", "--name", www, "--network", network, "-p", port+":80", engine.Image)
	d.fetch("the host", d.NS(), "127.0.0.1:"+port)
	d.fetch("outside", d.Outside().NS(), engine.HostAddr.Addr().String()+":"+port)
	d.docker("run", "--rm", "--network", network, engine.Image, "ping", "-c", "1", engine.FarAddr.String())
	d.docker("run", "--rm", "--network", network, engine.Image, "probe", "resolve", engine.FarName)
	d.docker("run", "--rm", "--network", network, engine.Image, "probe", "fetch", "http://"+www+"/")
}

// docker shows a docker command and what it prints.
func (d *engineDemo) docker(args ...string) {
	if d.err != nil {
		return
	}
	fmt.Println("\n$ docker " + strings.Join(args, " "))
	out, err := d.Docker(d.ctx, args...)
	d.print(out)
	d.err = err
}

// quiet is docker without a show.
func (d *engineDemo) quiet(args ...string) string {
	if d.err != nil {
		return ""
	}
	out, err := d.Docker(d.ctx, args...)
	d.err = err
	return out
}

func (d *engineDemo) usernet(args ...string) {
	if d.err != nil {
		return
	}
	fmt.Println("\n$ usernet " + strings.Join(args, " "))
	out, err := d.Usernet(d.ctx, args...)
	d.print(out)
	d.err = err
}

// fetch shows the page of a published port.
func (d *engineDemo) fetch(who string, from *netns.NS, addr string) {
	d.page(who, addr, func() (string, error) { return engine.Get(d.ctx, from, addr) })
}
