package cli

import (
	"flag"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/vsock"
)

// Gvforwarder is what a command line of gvforwarder, gvproxy's helper in a VM, asks for.
type Gvforwarder struct {
	Version     bool // to print "gvforwarder version X" and nothing else; the other fields are zero
	Gateway     Remote
	Interface   string      // the TAP
	StopIfExist []string    // interfaces; where one is there when it starts, it exits with 0
	MAC         gvproxy.MAC // for the TAP; zero: as it is
	MTU         int         // bytes; only what gvforwarder makes its buffers for. The TAP's comes by DHCP
	Preexisting bool        // the TAP is there and somebody else brings it up and asks DHCP
	Debug       bool
}

// Remote is how gvforwarder reaches the gateway.
type Remote struct {
	Addr    vsock.Addr // zero: by the command
	Path    string     // what is posted on the connection before frames follow; "": they follow at once
	Command []string   // a program with its arguments whose stdin and stdout are the connection
}

const (
	connectPath     = "/connect"
	defaultURL      = "vsock://2:1024" + connectPath
	defaultTAP      = "tap0"
	defaultStop     = "eth0,ens3,enp0s1"
	defaultGuestMTU = 4000
)

// ParseGvforwarder reads the arguments of gvforwarder, without its name.
func ParseGvforwarder(args []string) (Gvforwarder, error) {
	var (
		g              Gvforwarder
		to, hw, absent string
		err            error
	)
	fs := flag.NewFlagSet("gvforwarder", flag.ContinueOnError)
	fs.StringVar(&to, "url", defaultURL, "`URL` of the gateway: vsock://CID:PORT/PATH, unix:///PATH or stdio:/PROGRAM?FLAG=VALUE")
	fs.StringVar(&g.Interface, "iface", defaultTAP, "`name` of the TAP")
	fs.StringVar(&absent, "stop-if-exist", defaultStop, "exit when one of these `interfaces` is there")
	fs.StringVar(&hw, "mac", deviceMAC, "MAC `address` of the TAP; empty: leave it")
	fs.IntVar(&g.MTU, "mtu", defaultGuestMTU, "largest packet in `bytes`")
	fs.BoolVar(&g.Preexisting, "preexisting", false, "the TAP is there and is configured by others")
	fs.BoolVar(&g.Debug, "debug", false, "log every frame")
	fs.BoolVar(&g.Version, "version", false, "print the version")
	if err := parseFlags(fs, args); err != nil {
		return Gvforwarder{}, err
	}
	if g.Version {
		return Gvforwarder{Version: true}, nil
	}
	if g.Gateway, err = remote(to); err != nil {
		return Gvforwarder{}, fmt.Errorf("-url: %w", err)
	}
	if hw != "" {
		if g.MAC, err = mac(hw); err != nil {
			return Gvforwarder{}, fmt.Errorf("-mac: %w", err)
		}
	}
	if g.Interface == "" || len(g.Interface) > 15 || strings.ContainsAny(g.Interface, "/ \t\n\x00") {
		return Gvforwarder{}, invalid("-iface %.64q: want the name of an interface", g.Interface)
	}
	if g.MTU < minMTU || g.MTU > maxMTU {
		return Gvforwarder{}, invalid("-mtu %d: want %d to %d", g.MTU, minMTU, maxMTU)
	}
	g.StopIfExist = slices.DeleteFunc(strings.Split(absent, ","), func(name string) bool { return name == "" })
	return g, nil
}

// remote reads the URL of a gateway. The API's path stands in those of vsock; on other sockets it is always /connect.
func remote(text string) (Remote, error) {
	if rest, ok := strings.CutPrefix(text, "stdio:"); ok {
		return program(rest)
	}
	addr, err := vsock.Parse(text)
	if err != nil {
		return Remote{}, invalid("%w", err)
	}
	if addr.Scheme() == "vsock" {
		return Remote{Addr: addr, Path: addr.RequestPath()}, nil
	}
	return Remote{Addr: addr, Path: connectPath}, nil
}

// program reads /PROGRAM?FLAG=VALUE&…, where each pair is a flag of the program.
func program(text string) (Remote, error) {
	u, err := url.Parse(text)
	if err != nil || u.Path == "" || u.Host != "" {
		return Remote{}, invalid("%.128q: want stdio:/PROGRAM?FLAG=VALUE", text)
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return Remote{}, invalid("%.128q: %w", text, err)
	}
	command := []string{u.Path}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		for _, value := range query[name] {
			command = append(command, fmt.Sprintf("-%s=%s", name, value))
		}
	}
	return Remote{Command: command}, nil
}
