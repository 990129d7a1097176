// Command demo shows usernet's main job and leaves nothing behind. Its argument says where:
//
//	demo docker     on a real Docker engine: one network of each kind, a web server with a published port on it, the page
//	                fetched from the host and from outside, ping and names from inside. The engine is a private one in
//	                namespaces of its own; a user's own engine is never touched.
//	demo none       without an engine, and without root if it has none: commands on networks of their own.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/usernet/usernet/test/engine"
)

func main() {
	engine.Holder()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	demos := map[string]func(context.Context) error{"docker": docker, "none": alone}
	if len(os.Args) != 2 || demos[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: demo docker|none")
		os.Exit(2)
	}
	if err := demos[os.Args[1]](ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo stops at the first thing that does not work; what comes after it then does nothing.
type demo struct {
	ctx context.Context
	err error
}

func (d *demo) heading(s string) {
	if d.err == nil {
		fmt.Printf("\n== %s\n", s)
	}
}

// page shows what get gets from a server, which may still be starting.
func (d *demo) page(who, addr string, get func() (string, error)) {
	if d.err != nil {
		return
	}
	fmt.Printf("\nfrom %s: $ curl http://%s/\n", who, addr)
	var page string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		page, d.err = get()
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
