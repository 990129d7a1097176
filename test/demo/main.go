// Command demo shows usernet's main job on a real Docker engine: one network of each kind, a web server with a
// published port on it, the page fetched from the host and from outside, ping and names from inside. The engine is a private
// one in namespaces of its own, and everything it shows is gone afterwards; a user's own engine is never touched.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/test/engine"
)

func main() {
	engine.Holder()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo stops at the first thing that does not work; what comes after it then does nothing.
type demo struct {
	*engine.Engine
	ctx context.Context
	err error
}

func run(ctx context.Context) (err error) {
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
	d := &demo{Engine: e, ctx: ctx}
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
func (d *demo) show(network, port string, create ...string) {
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

func (d *demo) heading(s string) {
	if d.err == nil {
		fmt.Printf("\n== %s\n", s)
	}
}

// docker shows a docker command and what it prints.
func (d *demo) docker(args ...string) {
	if d.err != nil {
		return
	}
	fmt.Println("\n$ docker " + strings.Join(args, " "))
	out, err := d.Docker(d.ctx, args...)
	d.print(out)
	d.err = err
}

// quiet is docker without a show.
func (d *demo) quiet(args ...string) string {
	if d.err != nil {
		return ""
	}
	out, err := d.Docker(d.ctx, args...)
	d.err = err
	return out
}

func (d *demo) usernet(args ...string) {
	if d.err != nil {
		return
	}
	fmt.Println("\n$ usernet " + strings.Join(args, " "))
	out, err := d.Usernet(d.ctx, args...)
	d.print(out)
	d.err = err
}

// fetch shows the page of a published port. The server may still be starting.
func (d *demo) fetch(who string, from *netns.NS, addr string) {
	if d.err != nil {
		return
	}
	fmt.Printf("\nfrom %s: $ curl http://%s/\n", who, addr)
	var page string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		page, d.err = engine.Get(d.ctx, from, addr)
		if d.err == nil || time.Now().After(deadline) {
			break
		}
	}
	d.print(page)
}

func (d *demo) print(text string) {
	for line := range strings.Lines(text) {
		fmt.Print("  ", strings.TrimRight(line, "\n"), "\n")
	}
}
