package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/usernet/usernet/driver/gateway"
	"github.com/usernet/usernet/vsock"
)

// list is a flag that may be given several times.
type list []string

func (l *list) String() string { return strings.Join(*l, " ") }

func (l *list) Set(value string) error {
	*l = append(*l, value)
	return nil
}

// parseLinger reads how long a gateway stays without machines.
func parseLinger(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err == nil && d <= 0 {
		err = errors.New("want more than 0")
	}
	return d, err
}

// gatewayForward is a forward as gvproxy's API lists it.
type gatewayForward struct {
	Local    string `json:"local"`
	Remote   string `json:"remote"`
	Protocol string `json:"protocol"`
}

// gatewayPorts lists what a running gateway has opened on the host.
func (p *program) gatewayPorts(ctx context.Context, c command, args []string) error {
	c.name, c.args = c.name+" ports", ""
	fs := p.flags(c)
	services := fs.String("services", "", "`URL` of the gateway's API (default: where usernet gateway has it)")
	asJSON := fs.Bool("json", false, "print JSON")
	if err := parse(fs, args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return wrongUse(fs, "unexpected argument %q", fs.Arg(0))
	}
	a, err := vsock.Parse(*services)
	if *services == "" {
		a, err = gatewaySocket()
	}
	if err != nil {
		return err
	}
	var all struct {
		Forwards  []gatewayForward    `json:"forwards"`
		Published []gateway.Published `json:"published"`
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return vsock.Dial(ctx, a) },
	}}
	if _, err := ask(ctx, client, "/services/forwarder/all", &all.Forwards); err != nil {
		return err
	}
	// gvproxy does not know it.
	if status, err := ask(ctx, client, gateway.PortsPath, &all.Published); err != nil && status != http.StatusNotFound {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(p.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(all)
	}
	return writePorts(p.stdout, all.Forwards, all.Published)
}

// ask gets a value from the gateway's API. The status is 0 if there was no answer.
func ask(ctx context.Context, client *http.Client, path string, into any) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://gateway"+path, nil)
	if err != nil {
		return 0, err
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		return res.StatusCode, fmt.Errorf("%s: %s", res.Status, strings.TrimSpace(string(text)))
	}
	if err := json.NewDecoder(res.Body).Decode(into); err != nil {
		return res.StatusCode, fmt.Errorf("read answer: %w", err)
	}
	return res.StatusCode, nil
}

func writePorts(w io.Writer, forwards []gatewayForward, published []gateway.Published) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "PROTOCOL\tHOST\tLEADS TO\tCONNECTIONS")
	for _, f := range forwards {
		fmt.Fprintf(t, "%s\t%s\t%s\t\n", f.Protocol, f.Local, f.Remote)
	}
	for _, p := range published {
		host := ""
		if p.Addr.IsValid() {
			host = p.Addr.String()
		}
		fmt.Fprintf(t, "%s\t%s\tpublished by %s\t%d of %d\n", p.Proto, net.JoinHostPort(host, strconv.Itoa(int(p.Port))), p.Guest, p.Active, p.Accepted)
	}
	return t.Flush()
}

// gatewayRegister prints, writes or removes the entry of the registry that Hyper-V wants for a service.
func (p *program) gatewayRegister(c command, args []string) error {
	c.name, c.args = c.name+" register", "[URL]"
	fs := p.flags(c)
	name := fs.String("name", "usernet gateway", "`name` of the entry, for people")
	install := fs.Bool("install", false, "write it into this machine's registry, as administrator")
	remove := fs.Bool("remove", false, "take it out of there")
	if err := parse(fs, args); err != nil {
		return err
	}
	text := "hvsock://wildcard/1024"
	if fs.NArg() > 0 {
		text = fs.Arg(0)
	}
	if fs.NArg() > 1 || *install && *remove {
		return wrongUse(fs, "want one URL, and one thing to do")
	}
	a, err := vsock.Parse(text)
	if err != nil {
		return err
	}
	r, ok := a.Registration(*name)
	if !ok {
		return fmt.Errorf("%s: only hvsock://VMID/SERVICE needs an entry", a)
	}
	switch {
	case *install:
		return r.Install()
	case *remove:
		return r.Remove()
	}
	_, err = io.WriteString(p.stdout, r.File())
	return err
}
