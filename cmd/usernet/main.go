// Command usernet gives containers and virtual machines their network. See usernet(8).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
)

// version is set by the build; see the Makefile.
var version = ""

// program is one run of the command.
type program struct {
	name           string // that it was called by
	stdin          io.Reader
	stdout, stderr io.Writer
	hangup         <-chan struct{} // serve: look at everything again
}

// command is one sub-command; commands has those of the operating system. Its flags are its own; run gets the arguments behind them.
type command struct {
	name, args, about string
	run               func(p *program, ctx context.Context, c command, args []string) error
}

// caller is the program under a name other than usernet, or as programs call it that know nothing of its commands. done is false
// if it was not called so.
type caller func(p *program, ctx context.Context, args []string) (status int, done bool)

// as is the program under one other name.
func as(name string, run func(p *program, ctx context.Context, args []string) int) caller {
	return func(p *program, ctx context.Context, args []string) (int, bool) {
		if p.name != name {
			return 0, false
		}
		return run(p, ctx, args), true
	}
}

// errUsage says that the command line was wrong and that this was told already.
var errUsage = errors.New("usage")

// exitError ends the program with a status of its own.
type exitError struct {
	status int
	err    error // nil: told already, or nothing to tell
}

func (e *exitError) Error() string { return fmt.Sprint(e.err) }
func (e *exitError) Unwrap() error { return e.err }

func main() {
	if helper(os.Args[1:]) {
		return
	}
	// The first signal ends the program in order; a second one ends it at once.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	hups := make(chan os.Signal, 1)
	signal.Notify(hups, syscall.SIGHUP)
	hangup := make(chan struct{})
	go func() {
		for range hups {
			select {
			case hangup <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	}()
	p := &program{name: strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe"), stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, hangup: hangup}
	os.Exit(p.main(ctx, os.Args[1:]))
}

// main runs the command line and returns the exit status: 0, 1 for a failure, 2 for a wrong command line.
func (p *program) main(ctx context.Context, args []string) int {
	for _, c := range callers {
		if status, done := c(p, ctx, args); done {
			return status
		}
	}
	if len(args) == 0 {
		p.usage(p.stderr)
		return 2
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		p.usage(p.stdout)
		return 0
	case "-version", "--version":
		args[0] = "version"
	}
	for _, c := range commands {
		if c.name != args[0] {
			continue
		}
		return p.status("usernet "+c.name, c.run(p, ctx, c, args[1:]))
	}
	fmt.Fprintf(p.stderr, "usernet: there is no command %q\n", args[0])
	p.usage(p.stderr)
	return 2
}

// status tells what went wrong, in the name of what the program was called as, and returns its exit status.
func (p *program) status(name string, err error) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2
	}
	status := 1
	if exit, ok := errors.AsType[*exitError](err); ok {
		if status = exit.status; exit.err == nil {
			return status
		}
	}
	fmt.Fprintf(p.stderr, "%s: %v\n", name, err)
	return status
}

func (p *program) usage(w io.Writer) {
	var b strings.Builder
	b.WriteString("usage: usernet COMMAND [FLAGS] [ARGUMENTS]\n\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "  %-10s %s\n", c.name, c.about)
	}
	b.WriteString("\nusernet COMMAND -h lists the flags of a command.\n")
	io.WriteString(w, b.String())
}

// flags makes the flag set of a command.
func (p *program) flags(c command) *flag.FlagSet {
	fs := flag.NewFlagSet("usernet "+c.name, flag.ContinueOnError)
	fs.SetOutput(p.stderr)
	fs.Usage = func() {
		fmt.Fprintln(p.stderr, strings.TrimSpace(fmt.Sprintf("usage: usernet %s [FLAGS] %s", c.name, c.args)))
		fs.PrintDefaults()
	}
	return fs
}

// parse reads the flags; what is wrong with them has been told when it returns errUsage.
func parse(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	return nil
}

// wrongUse tells what is wrong with the arguments and how they should be.
func wrongUse(fs *flag.FlagSet, format string, args ...any) error {
	fmt.Fprintf(fs.Output(), format+"\n", args...)
	fs.Usage()
	return errUsage
}

func (p *program) version(_ context.Context, c command, args []string) error {
	if err := parse(p.flags(c), args); err != nil {
		return err
	}
	_, err := fmt.Fprintln(p.stdout, "usernet", buildVersion())
	return err
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
