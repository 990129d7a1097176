package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/usernet/usernet/agent"
	"github.com/usernet/usernet/dns/resolvconf"
	"github.com/usernet/usernet/driver/gvproxy/cli"
	"github.com/usernet/usernet/usermode/l2"
)

// gvforwarderName is the name of gvproxy's helper in a guest.
const gvforwarderName = "gvforwarder"

// Defaults of the agent.
const (
	agentURL   = "vsock://2:1024/connect"
	agentMAC   = "5a:94:ef:e4:0c:ee" // to gvproxy, and so to its clients, the first machine's
	agentTAP   = "tap0"
	ownMAC     = "auto"
	machineID  = "/etc/machine-id"
	apiConnect = "/connect"
)

func (p *program) agent(ctx context.Context, c command, args []string) error {
	fs := p.flags(c)
	gateway := fs.String("url", agentURL, "`URL` of the gateway; see usernet-agent(8)")
	mac := fs.String("mac", agentMAC, "MAC `address` of the TAP; auto: one of this machine's own, empty: leave it")
	absent := fs.String("stop-if-exist", "", "do nothing if one of these `interfaces` is there")
	debug := fs.Bool("debug", false, "log more")
	var cfg agent.Config
	fs.StringVar(&cfg.Interface, "iface", agentTAP, "`name` of the TAP")
	fs.IntVar(&cfg.MTU, "mtu", 0, "`bytes` of the largest IP packet; 0: what DHCP says")
	fs.BoolVar(&cfg.Preexisting, "preexisting", false, "the TAP is there and is configured by others")
	fs.BoolVar(&cfg.NoDHCP, "no-dhcp", false, "do not ask DHCP for an address")
	fs.StringVar(&cfg.ResolvConf, "resolv-conf", resolvconf.Path, "`file` that gets the resolvers that DHCP names; empty: none")
	if err := parse(fs, args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return wrongUse(fs, "unexpected argument %q", fs.Arg(0))
	}
	// What the URL may be is gvforwarder's; so is the rest of what its flags mean.
	g, err := cli.ParseGvforwarder([]string{"-url", *gateway})
	if err != nil {
		return err
	}
	cfg.Gateway, cfg.Path, cfg.Command = g.Gateway.Addr, g.Gateway.Path, g.Gateway.Command
	if cfg.Path == "" && len(cfg.Command) == 0 {
		cfg.Path = apiConnect
	}
	if cfg.MAC, err = agentAddress(*mac, cfg.Interface); err != nil {
		return err
	}
	cfg.Log = p.agentLog(*debug)
	if name := firstThere(strings.Split(*absent, ",")); name != "" {
		cfg.Log.Info("nothing to do: there is a network", "interface", name)
		return nil
	}
	cfg.Ready = func() { daemon.SdNotify(false, daemon.SdNotifyReady) }
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

func (p *program) agentLog(debug bool) *slog.Logger {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: level}))
}

// agentAddress reads the flag -mac.
func agentAddress(text, iface string) (l2.MAC, error) {
	switch text {
	case "":
		return l2.MAC{}, nil
	case ownMAC:
		id, err := os.ReadFile(machineID)
		if err != nil {
			return l2.MAC{}, fmt.Errorf("-mac auto: %w", err)
		}
		return addressOf(strings.TrimSpace(string(id)), iface), nil
	}
	mac, err := l2.ParseMAC(text)
	if err != nil {
		return l2.MAC{}, fmt.Errorf("-mac: %w", err)
	}
	return mac, nil
}

// addressOf is an address that a machine's interface always has. machine-id(5) asks for the ID not to be shown to others: a hash is.
func addressOf(machine, iface string) l2.MAC {
	sum := sha256.Sum256([]byte("usernet agent\x00" + machine + "\x00" + iface))
	mac := l2.MAC(sum[:6])
	mac[0] = mac[0]&^1 | 2 // locally administered, not a group's
	return mac
}

// firstThere is the first of the interfaces that exists, or "".
func firstThere(names []string) string {
	for _, name := range names {
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		if _, err := net.InterfaceByName(name); err == nil {
			return name
		}
	}
	return ""
}

// gvforwarder is the agent by gvforwarder's flags. It tries again for ever, whatever goes wrong.
func (p *program) gvforwarder(ctx context.Context, args []string) int {
	g, err := cli.ParseGvforwarder(args)
	if usage, ok := errors.AsType[*cli.UsageError](err); ok {
		fmt.Fprint(p.stderr, usage.Text)
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if err != nil {
		return p.status(gvforwarderName, err)
	}
	if g.Version {
		fmt.Fprintln(p.stdout, gvforwarderName, "version", buildVersion())
		return 0
	}
	log := p.agentLog(g.Debug)
	if name := firstThere(g.StopIfExist); name != "" {
		log.Info("nothing to do: there is a network", "interface", name)
		return 0
	}
	a, err := agent.New(agent.Config{
		Gateway: g.Gateway.Addr, Path: g.Gateway.Path, Command: g.Gateway.Command,
		Interface: g.Interface, Preexisting: g.Preexisting, MAC: l2.MAC(g.MAC),
		ResolvConf: resolvconf.Path, Wait: time.Second, MaxWait: time.Second, Log: log,
	})
	if err != nil {
		return p.status(gvforwarderName, err)
	}
	for {
		err := a.Run(ctx)
		if ctx.Err() != nil {
			return p.status(gvforwarderName, err)
		}
		log.Error("the tap cannot be used", "error", err)
		select {
		case <-ctx.Done():
			return 0
		case <-time.After(time.Second):
		}
	}
}
