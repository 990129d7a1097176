//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/internal/hostnet"
	"github.com/usernet/usernet/ipam"
	"github.com/usernet/usernet/standalone"
)

// The exit statuses of run when there is none of the command's, as those of docker run and podman run.
const (
	runFailed   = 125
	runNoExec   = 126
	runNotFound = 127
)

// runFlags are what the command line of run says.
type runFlags struct {
	ports    []usernet.Port
	options  map[string]string
	ip, ip6  string
	servers  []netip.AddrPort
	share    string
	name     string
	user     string
	noEgress bool
	verbose  bool
}

func (p *program) run(_ context.Context, c command, args []string) error {
	f, command, err := p.runFlags(c, args)
	if err != nil {
		return err
	}
	cfg, err := f.config()
	if err != nil {
		return &exitError{runFailed, err}
	}
	cfg.Command = command
	cfg.Stdin, cfg.Stdout, cfg.Stderr = os.Stdin, os.Stdout, os.Stderr
	status, err := standalone.Run(cfg)
	if start, ok := errors.AsType[*standalone.StartError](err); ok {
		if start.Errno == unix.ENOENT {
			return &exitError{runNotFound, err}
		}
		return &exitError{runNoExec, err}
	}
	if err != nil {
		return &exitError{runFailed, err}
	}
	if status.Signaled() {
		dieBy(status.Signal())
	}
	if n := status.ExitStatus(); n != 0 {
		return &exitError{status: n}
	}
	return nil
}

// dieBy ends the process by the signal that ended the command: whoever waits for it sees the command's end.
func dieBy(s syscall.Signal) {
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) // one core dump is enough
	signal.Reset(s)
	unix.Kill(os.Getpid(), s)
	select {} // it is on its way; SIGKILL and SIGSTOP cannot be caught, and the others are not any more
}

func (p *program) runFlags(c command, args []string) (*runFlags, []string, error) {
	f := &runFlags{options: map[string]string{}}
	flags := p.flags(c)
	publish := func(s string) error {
		ports, err := config.Ports(s)
		f.ports = append(f.ports, ports...)
		return err
	}
	option := func(s string) error {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return errors.New("want NAME=VALUE")
		}
		f.options[name] = value
		return nil
	}
	for _, name := range []string{"p", "publish"} {
		flags.Func(name, "publish a `port` of the command: [IP:][HOST[-END]:]PORT[/tcp|udp]", publish)
	}
	for _, name := range []string{"o", "net-opts"} {
		flags.Func(name, "set an `option` of the network, such as mtu=9000; see usernet(8)", option)
	}
	mode := flags.String("mode", string(usernet.Usermode), "the `kind` of network; there is usermode only")
	flags.StringVar(&f.ip, "ip", "", "the command's IPv4 `address`; 10.87.0.2 or a neighbour")
	flags.StringVar(&f.ip6, "ip6", "", "the command's IPv6 `address`")
	flags.Func("dns", "ask this resolver (`address`) instead of the host's; may be given several times", func(s string) error {
		a, err := netip.ParseAddr(s)
		f.servers = append(f.servers, netip.AddrPortFrom(a, 53))
		return err
	})
	flags.StringVar(&f.share, "share", "", "run on the network of this `name`, together with other commands")
	flags.StringVar(&f.name, "name", "", "what the others on a shared network call the command")
	flags.StringVar(&f.user, "user", "root", "who the command is to itself: root or `self`")
	flags.BoolVar(&f.noEgress, "no-egress", false, "let the command reach nothing outside")
	flags.BoolVar(&f.verbose, "verbose", false, "tell what happens")
	if err := parse(flags, args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, nil, err
		}
		return nil, nil, &exitError{status: runFailed}
	}
	switch {
	case flags.NArg() == 0:
		wrongUse(flags, "what is to be run?")
	case *mode != string(usernet.Usermode):
		wrongUse(flags, "mode %q needs an engine: usernet run makes usermode networks", *mode)
	case f.user != "root" && f.user != "self":
		wrongUse(flags, "user %q: want root or self", f.user)
	case f.name != "" && f.share == "":
		wrongUse(flags, "a name is for a network that is shared")
	default:
		return f, flags.Args(), nil
	}
	return nil, nil, &exitError{status: runFailed}
}

// config makes the network that the flags describe.
func (f *runFlags) config() (standalone.Config, error) {
	level := slog.LevelWarn
	if f.verbose {
		level = slog.LevelDebug
	}
	cfg := standalone.Config{
		Ports:    f.ports,
		Servers:  f.servers,
		NoEgress: f.noEgress,
		Share:    f.share,
		Hostname: f.name,
		Keep:     f.user == "self",
		Log:      slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})),
	}
	options, err := config.Options(f.options)
	if err != nil {
		return cfg, err
	}
	if options.Mode != usernet.Usermode {
		return cfg, fmt.Errorf("mode %s needs an engine: usernet run makes usermode networks", options.Mode)
	}
	var id [6]byte
	rand.Read(id[:])
	n := usernet.Network{ID: hex.EncodeToString(id[:]), Subnets: options.Subnets, Options: options, IPv6: true}
	if len(n.Subnets) == 0 {
		if n.Subnets, err = subnets(f.ip, f.ip6); err != nil {
			return cfg, err
		}
	}
	if err := config.Network(n); err != nil {
		return cfg, err
	}
	if cfg.Addr4, err = address(n, f.ip, false); err != nil {
		return cfg, err
	}
	if cfg.Addr6, err = address(n, f.ip6, true); err != nil {
		return cfg, err
	}
	if !cfg.Addr4.IsValid() && !cfg.Addr6.IsValid() {
		return cfg, errors.New("the network has no address for the command")
	}
	if f.share != "" { // the holder chooses what is not wanted, and may have other subnets
		if f.ip == "" {
			cfg.Addr4 = netip.Addr{}
		}
		if f.ip6 == "" {
			cfg.Addr6 = netip.Addr{}
		}
	}
	cfg.Network = n
	return cfg, nil
}

// subnets are those of a network that nobody said anything about. A wanted address brings its own.
func subnets(ip, ip6 string) ([]usernet.Subnet, error) {
	var ns []usernet.Subnet
	if a, err := netip.ParseAddr(ip); err == nil && a.Is4() {
		p := netip.PrefixFrom(a, 24).Masked()
		ns = append(ns, usernet.Subnet{Prefix: p, Gateway: p.Addr().Next()})
	} else {
		used, err := hostnet.Routed()
		if err != nil {
			return nil, err
		}
		s, err := ipam.Subnet4(used)
		if err != nil {
			return nil, err
		}
		ns = append(ns, s)
	}
	p := netip.PrefixFrom(uniqueLocal(), 64)
	if a, err := netip.ParseAddr(ip6); err == nil && a.Is6() {
		p = netip.PrefixFrom(a, 64).Masked()
	}
	return append(ns, usernet.Subnet{Prefix: p, Gateway: p.Addr().Next()}), nil
}

// uniqueLocal is the first address of a unique local /64 of IPv6 (RFC 4193).
func uniqueLocal() netip.Addr {
	var b [16]byte
	rand.Read(b[1:6])
	b[0] = 0xfd
	return netip.AddrFrom16(b)
}

// address is the command's in the family's subnet: the wanted one or the first that is free.
func address(n usernet.Network, want string, v6 bool) (netip.Addr, error) {
	i := slices.IndexFunc(n.Subnets, func(s usernet.Subnet) bool { return s.Prefix.Addr().Is6() == v6 })
	if want == "" {
		if i < 0 {
			return netip.Addr{}, nil
		}
		return ipam.Next(n.Subnets[i], func(netip.Addr) bool { return false })
	}
	a, err := netip.ParseAddr(want)
	switch {
	case err != nil || a.Is6() != v6:
		return netip.Addr{}, fmt.Errorf("%q is no address of the family", want)
	case i < 0 || !n.Subnets[i].Prefix.Contains(a):
		return netip.Addr{}, fmt.Errorf("%s is in no subnet of the network", a)
	case a == n.Subnets[i].Gateway:
		return netip.Addr{}, fmt.Errorf("%s is the gateway's address", a)
	}
	return a, nil
}
