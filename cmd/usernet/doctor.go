//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/doctor"
	"github.com/usernet/usernet/driver/control"
)

// doctor reports what this machine can do. Its exit status is 1 if usermode networks cannot work for the user.
func (p *program) doctor(ctx context.Context, c command, args []string) error {
	if len(args) > 0 && args[0] == doctor.ProbeCommand {
		return doctor.Probe(ctx, args[1:], p.stdout)
	}
	flags := p.flags(c)
	asJSON := flags.Bool("json", false, "print JSON")
	file := flags.String("config", configFile(), "the daemon's configuration `file`")
	socket := flags.String("control-socket", daemonDefaults().ControlSocket, "the daemon's control `socket`, instead of that in its configuration")
	if err := parse(flags, args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return wrongUse(flags, "unexpected argument %q", flags.Arg(0))
	}
	cfg := doctor.Config{
		Version: buildVersion(),
		File:    *file,
		Probe:   []string{"/proc/self/exe", c.name, doctor.ProbeCommand},
		Ask:     askDaemon,
	}
	cfg.Daemon, cfg.Faulty = readDaemon(*file)
	if *socket != daemonDefaults().ControlSocket {
		cfg.Daemon.ControlSocket = *socket
	}
	found := doctor.Examine(ctx, cfg)
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.report(found, *asJSON); err != nil {
		return err
	}
	if !doctor.Works(found) {
		return &exitError{status: 1}
	}
	return nil
}

func (p *program) report(found []doctor.Finding, asJSON bool) error {
	if !asJSON {
		return doctor.Write(p.stdout, found, colourful(p.stdout))
	}
	enc := json.NewEncoder(p.stdout)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(found)
}

// colourful tells whether w is a terminal whose user did not say that they want no colours (no-color.org).
func colourful(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// readDaemon is the daemon's configuration; its defaults where there is no file or a faulty one.
func readDaemon(file string) (config.Daemon, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return daemonDefaults(), nil
	}
	if err != nil {
		return daemonDefaults(), fmt.Errorf("read configuration: %w", err)
	}
	cfg, err := config.ParseDaemon(text, daemonDefaults())
	if err != nil {
		return daemonDefaults(), err
	}
	return cfg, nil
}

// askDaemon asks a daemon how it is.
func askDaemon(ctx context.Context, socket string) (doctor.Daemon, error) {
	list, err := control.NewClient(socket).Networks(ctx)
	if errors.Is(err, control.ErrAbsent) {
		return doctor.Daemon{}, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	d := doctor.Daemon{Networks: len(list)}
	for _, n := range list {
		if !n.Up {
			d.Down = append(d.Down, fmt.Sprintf("%.12s", n.ID))
		}
	}
	return d, err
}
