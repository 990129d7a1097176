package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/usernet/usernet/driver/gateway"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/driver/gvproxy/cli"
	"github.com/usernet/usernet/usermode/l2"
	"github.com/usernet/usernet/vsock"
)

// gvproxyName is the name under which podman machine and others look for the gateway.
const gvproxyName = "gvproxy"

// gateway is the host's side of virtual machines.
func (p *program) gateway(ctx context.Context, c command, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "ports":
			return p.gatewayPorts(ctx, c, args[1:])
		case "register":
			return p.gatewayRegister(c, args[1:])
		}
	}
	fs := flag.NewFlagSet("usernet "+c.name, flag.ContinueOnError)
	more := newGatewayFlags(fs)
	g, err := cli.ParseFlags(fs, args, os.ReadFile)
	if err != nil {
		return p.gatewayUsage(err)
	}
	if g.Version {
		_, err := fmt.Fprintln(p.stdout, "usernet", buildVersion())
		return err
	}
	if fs.NArg() > 0 {
		return wrongUse(fs, "unexpected argument %q", fs.Arg(0))
	}
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if !given["ssh-port"] && !given["config"] {
		g.Network.Forwards = nil // port 2222 of the host could be one gateway's only
	}
	cfg, err := more.config(g)
	if err != nil {
		return err
	}
	if len(cfg.Services) == 0 && !given["services"] {
		a, err := gatewaySocket()
		if err != nil {
			return err
		}
		cfg.Services = []vsock.Addr{a}
	}
	if !cfg.Reachable() {
		a, err := vsock.Parse(defaultDoor())
		if err != nil {
			return errors.New("there is no way for machines to come: say -listen-vfkit, -listen-qemu or -listen")
		}
		cfg.Machines = []vsock.Addr{a}
	}
	return p.runGateway(ctx, g, cfg)
}

// gvproxy is the gateway by gvproxy's flags.
func (p *program) gvproxy(ctx context.Context, args []string) int {
	g, err := cli.ParseGvproxy(args, os.ReadFile)
	switch {
	case err != nil:
		return p.status(gvproxyName, p.gatewayUsage(err))
	case g.Version:
		fmt.Fprintln(p.stdout, "gvproxy version", buildVersion())
		return 0
	}
	return p.status(gvproxyName, p.runGateway(ctx, g, gateway.FromGvproxy(g)))
}

// gatewayUsage tells what is wrong with a command line.
func (p *program) gatewayUsage(err error) error {
	usage, ok := errors.AsType[*cli.UsageError](err)
	if !ok {
		return err
	}
	io.WriteString(p.stderr, usage.Text)
	if errors.Is(err, flag.ErrHelp) {
		return flag.ErrHelp
	}
	return errUsage
}

func (p *program) runGateway(ctx context.Context, g cli.Gvproxy, cfg gateway.Config) (err error) {
	out := p.stderr
	if g.LogFile != "" {
		f, err := os.Create(g.LogFile)
		if err != nil {
			return fmt.Errorf("log: %w", err)
		}
		defer f.Close()
		out = f
	}
	cfg.Log = slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: g.LogLevel}))
	for _, w := range g.Warnings {
		cfg.Log.Warn(w)
	}
	gw, err := gateway.New(cfg)
	if err == nil {
		err = gw.Run(ctx)
	}
	if err != nil && g.LogFile != "" {
		cfg.Log.Error("the gateway has ended", "err", err) // stderr may be nobody's
	}
	return err
}

// gatewayFlags are those that gvproxy does not have.
type gatewayFlags struct {
	machines, datagrams list
	publish             list
	leases              list
	subnet6             string
	isolated            bool
	linger              func(*gateway.Config)
}

func newGatewayFlags(fs *flag.FlagSet) *gatewayFlags {
	f := &gatewayFlags{linger: func(c *gateway.Config) { c.Hypervisors.Linger = 0 }}
	fs.Var(&f.machines, "listen-vm", "`URL` where machines connect and publish ports, repeatable; the API is not there")
	fs.Var(&f.datagrams, "listen-dgram", "`URL` to wait for a machine's datagrams at, repeatable: unixgram:///PATH")
	fs.Var(&f.publish, "p", "`ports`, repeatable: [HOST:]PORT:GUESTPORT[/udp], a port of the host that leads to the first machine")
	fs.Var(&f.leases, "lease", "`MAC=ADDRESS` of a machine, repeatable")
	fs.StringVar(&f.subnet6, "subnet6", gateway.Subnet6.String(), "`CIDR` of the IPv6 network, a /64, or none")
	fs.BoolVar(&f.isolated, "isolated", false, "machines reach the gateway only, not each other")
	fs.Func("linger", "`duration` to wait for another machine when the last one has left, and then to end (default: never end)", func(s string) error {
		d, err := parseLinger(s)
		f.linger = func(c *gateway.Config) { c.Hypervisors.Linger = d }
		return err
	})
	return f
}

// config puts the flags over what gvproxy's ask for.
func (f *gatewayFlags) config(g cli.Gvproxy) (gateway.Config, error) {
	cfg := gateway.FromGvproxy(g)
	cfg.Network.Isolated = f.isolated
	f.linger(&cfg)
	if err := f.setSubnet6(&cfg); err != nil {
		return cfg, err
	}
	for _, text := range f.machines {
		a, err := vsock.Parse(text)
		if err != nil {
			return cfg, fmt.Errorf("-listen-vm: %w", err)
		}
		cfg.Machines = append(cfg.Machines, a)
	}
	for _, text := range f.datagrams {
		path, ok := strings.CutPrefix(text, "unixgram://")
		if !ok || !strings.HasPrefix(path, "/") {
			return cfg, fmt.Errorf("-listen-dgram %q: want unixgram:///PATH", text)
		}
		cfg.Hypervisors.Datagrams = append(cfg.Hypervisors.Datagrams, path)
	}
	for _, text := range f.publish {
		fwd, err := parsePublish(text, g.Network.Device)
		if err != nil {
			return cfg, fmt.Errorf("-p %s: %w", text, err)
		}
		cfg.Forwards = append(cfg.Forwards, fwd)
	}
	for _, text := range f.leases {
		hw, addr, _ := strings.Cut(text, "=")
		mac, err := l2.ParseMAC(hw)
		if err != nil {
			return cfg, fmt.Errorf("-lease %s: %w", text, err)
		}
		a, err := netip.ParseAddr(addr)
		if err != nil {
			return cfg, fmt.Errorf("-lease %s: %w", text, err)
		}
		cfg.Network.Leases[a] = mac
	}
	return cfg, nil
}

func (f *gatewayFlags) setSubnet6(cfg *gateway.Config) error {
	if f.subnet6 == "none" {
		cfg.SetSubnet6(netip.Prefix{})
		return nil
	}
	p, err := netip.ParsePrefix(f.subnet6)
	if err != nil {
		return fmt.Errorf("-subnet6: %w", err)
	}
	cfg.SetSubnet6(p.Masked())
	return nil
}

// parsePublish reads [HOST:]PORT:GUESTPORT[/udp], the host as an IPv6 address in brackets if it is one.
func parsePublish(text string, guest netip.Addr) (gvproxy.Forward, error) {
	ports, proto, _ := strings.Cut(text, "/")
	if proto == "" {
		proto = "tcp"
	}
	i := strings.LastIndexByte(ports, ':')
	if i < 0 || proto != "tcp" && proto != "udp" {
		return gvproxy.Forward{}, errors.New("want [HOST:]PORT:GUESTPORT[/tcp|/udp]")
	}
	local := ports[:i]
	if !strings.Contains(local, ":") {
		local = ":" + local
	}
	if host, port, err := net.SplitHostPort(local); err != nil || port == "" || strings.ContainsAny(host, "/") {
		return gvproxy.Forward{}, errors.New("want [HOST:]PORT:GUESTPORT[/tcp|/udp]")
	}
	return gvproxy.ParseForward(gvproxy.Proto(proto), local, net.JoinHostPort(guest.String(), ports[i+1:]))
}

// defaultDoor is where machines come by if nothing else is said.
func defaultDoor() string {
	switch runtime.GOOS {
	case "linux":
		return "vsock://:1024"
	case "windows":
		return "hvsock://wildcard/1024"
	}
	return ""
}

// gatewaySocket is where the gateway's API is for usernet gateway ports; its directory is there afterwards.
func gatewaySocket() (vsock.Addr, error) {
	dir := filepath.Join(os.TempDir(), "usernet") // the user's own on macOS and Windows
	if runtime.GOOS == "linux" {
		dir = filepath.Join(os.TempDir(), fmt.Sprintf("usernet-%d", os.Getuid()))
		if run := os.Getenv("XDG_RUNTIME_DIR"); run != "" {
			dir = filepath.Join(run, "usernet")
		}
		if os.Getuid() == 0 {
			dir = "/run/usernet"
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return vsock.Addr{}, err
	}
	path := filepath.ToSlash(filepath.Join(dir, "gateway.sock"))
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // c:/...
	}
	return vsock.Parse("unix://" + path)
}
