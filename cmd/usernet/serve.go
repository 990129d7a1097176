//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
	"github.com/usernet/usernet/driver/libnetwork"
	"github.com/usernet/usernet/driver/netavark"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/sock"
	"github.com/usernet/usernet/vsock"
	"github.com/usernet/usernet/vsock/publish"
)

func (p *program) serve(ctx context.Context, c command, args []string) (err error) {
	cfg, err := p.serveConfig(c, args)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return joinPodman(ctx, append([]string{c.name}, args...))
	}
	if own, err := netns.Own(); err != nil {
		return err
	} else if own && netavark.Rootless() {
		return errors.New("this is Podman's network namespace, which goes with its last container: start usernet serve outside of it")
	}
	log := slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: cfg.LogLevel}))
	gateway, err := hostGateway(cfg.HostGateway, log)
	if err != nil {
		return err
	}

	// The sockets come first: whoever calls while the networks are brought back waits instead of being refused.
	plugin, ctl, err := listen(cfg)
	if err != nil {
		return err
	}
	defer ctl.Close()
	if plugin != nil {
		defer plugin.Close()
	}
	d, err := driver.Open(driver.Config{StateDir: cfg.StateDir, RunDir: cfg.RunDir, Rootless: rootless(), HostGateway: gateway, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()

	ctx, leave := context.WithCancel(ctx)
	defer leave()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.Run(ctx, p.hangup) })
	if gateway != nil {
		g.Go(func() error { return gateway.Run(ctx) })
	}
	if plugin != nil {
		g.Go(func() error { return sock.Serve(ctx, plugin, libnetwork.Handler(d, cfg.Defaults, log)) })
	}
	door := control.Handler(d, cfg.Defaults, log)
	if rootless() {
		door = control.Tied(door, d, leave)
	}
	g.Go(func() error { return sock.Serve(ctx, control.Listener(ctl), door) })
	log.Info("usernet is serving", "plugin", cfg.PluginSocket, "control", cfg.ControlSocket)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("systemd is not told that we are ready", "error", err)
	}
	err = g.Wait()
	log.Info("usernet is ending")
	return err
}

// hostGateway is the client of the gateway on the host of this virtual machine; nil: none is configured.
func hostGateway(url string, log *slog.Logger) (*publish.Client, error) {
	if url == "" {
		return nil, nil
	}
	at, err := vsock.Parse(url)
	if err != nil {
		return nil, fmt.Errorf("host gateway: %w", err)
	}
	dial := func(ctx context.Context) (net.Conn, error) { return vsock.Dial(ctx, at) }
	return publish.NewClient(publish.ClientConfig{Dial: dial, Name: at.String(), Log: log}), nil
}

// listen opens the sockets, or takes those that systemd has opened. plugin is nil where none is configured.
func listen(cfg config.Daemon) (plugin, ctl net.Listener, err error) {
	inherited, err := sock.Inherit()
	if err != nil {
		return nil, nil, err
	}
	defer inherited.Close()
	if cfg.PluginSocket != "" {
		if plugin, err = inherited.Listen("plugin", cfg.PluginSocket); err != nil {
			return nil, nil, err
		}
	}
	if ctl, err = inherited.Listen("control", cfg.ControlSocket); err != nil && plugin != nil {
		err = errors.Join(err, plugin.Close())
	}
	return plugin, ctl, err
}

// serveConfig reads the configuration: flags, over the file, over the defaults.
func (p *program) serveConfig(c command, args []string) (config.Daemon, error) {
	def := daemonDefaults()
	flags := p.flags(c)
	file := flags.String("config", configFile(), "configuration `file`")
	plugin := flags.String("plugin-socket", def.PluginSocket, "the `socket` that Docker calls")
	ctl := flags.String("control-socket", def.ControlSocket, "the `socket` for usernet's own commands")
	state := flags.String("state-dir", def.StateDir, "`directory` for what must survive a reboot")
	run := flags.String("run-dir", def.RunDir, "`directory` for what belongs to one boot")
	gateway := flags.String("host-gateway", def.HostGateway, "the `URL` of the gateway on this virtual machine's host: ports are published there as well")
	level := flags.String("log-level", def.LogLevel.String(), "debug, info, warn or error")
	if err := parse(flags, args); err != nil {
		return config.Daemon{}, err
	}
	if flags.NArg() > 0 {
		return config.Daemon{}, wrongUse(flags, "unexpected argument %q", flags.Arg(0))
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	cfg := def
	text, err := os.ReadFile(*file)
	switch {
	case err == nil:
		if cfg, err = config.ParseDaemon(text, def); err != nil {
			return config.Daemon{}, fmt.Errorf("%s: %w", *file, err)
		}
	case given["config"] || !errors.Is(err, fs.ErrNotExist):
		return config.Daemon{}, fmt.Errorf("read configuration: %w", err)
	}
	for name, set := range map[string]func(){
		"plugin-socket":  func() { cfg.PluginSocket = *plugin },
		"control-socket": func() { cfg.ControlSocket = *ctl },
		"state-dir":      func() { cfg.StateDir = *state },
		"run-dir":        func() { cfg.RunDir = *run },
		"host-gateway":   func() { cfg.HostGateway = *gateway },
	} {
		if given[name] {
			set()
		}
	}
	if given["log-level"] {
		if err := cfg.LogLevel.UnmarshalText([]byte(*level)); err != nil {
			return config.Daemon{}, fmt.Errorf("--log-level: want debug, info, warn or error, got %q", *level)
		}
	}
	return cfg, nil
}
