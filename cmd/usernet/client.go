//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver/control"
)

// clientFlags adds the flag that every command has that asks the daemon something.
func (p *program) clientFlags(c command) (*flag.FlagSet, *string) {
	fs := p.flags(c)
	return fs, fs.String("control-socket", daemonDefaults().ControlSocket, "the daemon's control `socket`")
}

func (p *program) ps(ctx context.Context, c command, args []string) error {
	fs, socket := p.clientFlags(c)
	asJSON := fs.Bool("json", false, "print JSON")
	if err := parse(fs, args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return wrongUse(fs, "unexpected argument %q", fs.Arg(0))
	}
	list, err := control.NewClient(*socket).Networks(ctx)
	if err != nil {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(p.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(list)
	}
	return table(p.stdout, list)
}

// table prints networks and, below them, endpoints.
func table(w io.Writer, list []control.Network) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "NETWORK\tMODE\tSUBNET\tGATEWAY\tENDPOINTS\tSTATE")
	for _, n := range list {
		var subnets, gateways []string
		for _, s := range n.Subnets {
			subnets = append(subnets, s.Subnet.String())
			if s.Gateway.IsValid() {
				gateways = append(gateways, s.Gateway.String())
			}
		}
		state := "up"
		switch {
		case !n.Up:
			state = "down"
		case n.Internal:
			state = "up, internal"
		}
		if n.Up && n.Path != "" {
			state += ", TCP by " + n.Path
		}
		if t := n.Traffic; t != nil && t.Refused+t.Evicted > 0 {
			state += fmt.Sprintf(", %d connections and %d flows over the limits", t.Refused, t.Evicted)
		}
		if n.PathError != "" {
			state += " (" + n.PathError + ")"
		}
		if n.DNSError != "" {
			state += ", names are not resolved: " + n.DNSError
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%s\n", called(n.Name, n.ID), n.Mode, orDash(subnets), orDash(gateways), len(n.Endpoints), state)
	}
	fmt.Fprintln(tw)
	fmt.Fprintln(tw, "ENDPOINT\tNETWORK\tADDRESS\tMAC\tPORTS")
	for _, n := range list {
		for _, e := range n.Endpoints {
			var addrs, ports []string
			for _, a := range []netip.Prefix{e.IPv4, e.IPv6} {
				if a.IsValid() {
					addrs = append(addrs, a.Addr().String())
				}
			}
			for _, pt := range e.Ports {
				s := arrow(pt)
				if pt.Error != "" {
					s += " (" + pt.Error + ")"
				}
				switch pt.Gateway {
				case control.GatewayUp:
					s += " and on the VM's host"
				case control.GatewayLost:
					s += " (lost on the VM's host: " + pt.GatewayError + ")"
				}
				ports = append(ports, s)
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", called(e.Container, e.ID), called(n.Name, n.ID), orDash(addrs), e.MAC, orDash(ports))
		}
	}
	return tw.Flush()
}

// called is what the engine calls something, or the beginning of its ID where the engine did not tell.
func called(name, id string) string {
	if name != "" {
		return name
	}
	return fmt.Sprintf("%.12s", id)
}

func orDash(items []string) string {
	if len(items) == 0 {
		return "-"
	}
	return strings.Join(items, ", ")
}

// arrow writes a published port as docker ps does: 0.0.0.0:8080->80/tcp; no host IP means all.
func arrow(p control.Port) string {
	host := "*"
	if p.HostIP.IsValid() {
		host = p.HostIP.String()
		if p.HostIP.Is6() {
			host = "[" + host + "]"
		}
	}
	return fmt.Sprintf("%s:%d->%d/%s", host, p.HostPort, p.ContainerPort, p.Proto)
}

func (p *program) port(ctx context.Context, c command, args []string) error {
	fs, socket := p.clientFlags(c)
	if err := parse(fs, args); err != nil {
		return err
	}
	verb, rest := fs.Arg(0), fs.Args()
	if verb != "add" && verb != "rm" {
		return wrongUse(fs, "want add or rm, got %q", verb)
	}
	// Flags are understood behind the verb as well.
	if err := parse(fs, rest[1:]); err != nil {
		return err
	}
	if fs.NArg() < 2 {
		return wrongUse(fs, "want an endpoint and at least one port")
	}
	var ports []usernet.Port
	for _, spec := range fs.Args()[1:] {
		ps, err := config.Ports(spec)
		if err != nil {
			return err
		}
		ports = append(ports, ps...)
	}
	client := control.NewClient(*socket)
	if verb == "rm" {
		return client.RemovePorts(ctx, fs.Arg(0), ports)
	}
	got, err := client.AddPorts(ctx, fs.Arg(0), ports)
	for _, port := range got {
		fmt.Fprintln(p.stdout, port)
	}
	return err
}

func (p *program) network(ctx context.Context, c command, args []string) error {
	fs, socket := p.clientFlags(c)
	if err := parse(fs, args); err != nil {
		return err
	}
	if fs.Arg(0) != "rm" {
		return wrongUse(fs, "want rm, got %q", fs.Arg(0))
	}
	if err := parse(fs, fs.Args()[1:]); err != nil {
		return err
	}
	if fs.NArg() == 0 {
		return wrongUse(fs, "want at least one network")
	}
	client := control.NewClient(*socket)
	var errs []error
	for _, id := range fs.Args() {
		if err := client.RemoveNetwork(ctx, id); err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(p.stdout, id)
	}
	return errors.Join(errs...)
}
