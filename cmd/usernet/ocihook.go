//go:build linux

package main

import (
	"context"
	"flag"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/driver/ocihook"
)

// ociRunDir is where the hooks keep files of running containers: beside the daemon's control socket.
func ociRunDir(d control.Daemon) string { return filepath.Join(filepath.Dir(d.Socket), "oci") }

func (p *program) ociHook(ctx context.Context, c command, args []string) error {
	daemon, settings := daemonCommand(), map[string]string{}
	fs := p.flags(c)
	fs.Func("control-socket", "the daemon's control `socket`", func(s string) error {
		daemon = control.Daemon{Socket: s}
		return nil
	})
	for _, s := range ocihook.Settings {
		set := func(value string) error {
			if s.Name == "publish" && settings[s.Name] != "" {
				value = settings[s.Name] + "," + value
			}
			settings[s.Name] = value
			return nil
		}
		fs.Func(strings.ReplaceAll(s.Name, "_", "-"), s.About, set)
		if s.Name == "publish" {
			fs.Func("p", "likewise `ports`", set)
		}
	}
	fs.Func("o", "set an `option` of the network, NAME=VALUE; see usernet(8)", func(s string) error {
		name, value, ok := strings.Cut(s, "=")
		if !ok || !slices.Contains(config.Names(), name) {
			return fmt.Errorf("want NAME=VALUE; the names are %s", strings.Join(config.Names(), ", "))
		}
		settings[name] = value
		return nil
	})
	if err := parse(fs, args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return wrongUse(fs, "unexpected argument %q", fs.Arg(0))
	}
	hook := &ocihook.Hook{Daemon: daemon, Settings: settings, RunDir: ociRunDir(daemon), Stdin: p.stdin}
	return hook.Run(ctx)
}

// netnsName is the name under which the program stands in for genuinetools' netns.
const netnsName = "netns"

// netnsFlags are the flags of netns, before its command or behind it. Some of them mean nothing here.
func (p *program) netnsFlags() (*flag.FlagSet, *ocihook.Netns) {
	daemon := daemonCommand()
	n := &ocihook.Netns{Daemon: daemon, RunDir: ociRunDir(daemon), Stdin: p.stdin, Stdout: p.stdout}
	fs := flag.NewFlagSet(netnsName, flag.ContinueOnError)
	fs.SetOutput(p.stderr)
	fs.StringVar(&n.Bridge, "bridge", "netns0", "`name` of the bridge")
	fs.StringVar(&n.Address, "ip", "172.19.0.1/16", "`address` of the bridge, with its subnet's mask")
	fs.IntVar(&n.MTU, "mtu", 1500, "`bytes` of the largest IP packet")
	fs.StringVar(&n.Interface, "iface", "eth0", "`name` of the container's interface")
	fs.StringVar(&n.IPFile, "ipfile", ".ip", "`file` to write the container's address to, from its bundle on")
	fs.StringVar(&n.StaticIP, "static-ip", "", "the container's `address`; any free one")
	fs.String("state-dir", "/run/github.com/genuinetools/netns", "ignored `directory`: the daemon knows which addresses are taken")
	fs.Bool("d", false, "ignored: the daemon logs")
	fs.Usage = func() {
		fmt.Fprint(p.stderr, "usage: netns [FLAGS] [create|ls|rm|version]\n\n"+
			"Without a command, a hook for OCI runtimes: a container's state is read from standard input.\n\n"+
			"  create    make the bridge\n  ls        list the containers on it\n  rm        delete the bridge\n  version   print the version\n\n")
		fs.PrintDefaults()
	}
	return fs, n
}

// netns is the program under the name netns.
func (p *program) netns(ctx context.Context, args []string) int {
	fs, n := p.netnsFlags()
	return p.status(netnsName, p.netnsCommand(ctx, fs, n, args))
}

func (p *program) netnsCommand(ctx context.Context, fs *flag.FlagSet, n *ocihook.Netns, args []string) error {
	if err := parse(fs, args); err != nil {
		return err
	}
	name := fs.Arg(0)
	if name != "" {
		if err := parse(fs, fs.Args()[1:]); err != nil {
			return err
		}
		if fs.NArg() > 0 {
			return wrongUse(fs, "unexpected argument %q", fs.Arg(0))
		}
	}
	switch name {
	case "":
		return n.Hook(ctx)
	case "create":
		return n.Create()
	case "ls":
		return n.List(ctx)
	case "rm":
		return n.Remove(ctx)
	case "version":
		_, err := fmt.Fprintln(p.stdout, "netns of usernet", buildVersion())
		return err
	}
	return wrongUse(fs, "there is no command %q", name)
}
