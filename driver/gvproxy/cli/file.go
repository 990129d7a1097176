package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/vsock"
)

// file is gvproxy's file as YAML has it.
type file struct {
	Listen     []string `yaml:"listen"`
	LogLevel   string   `yaml:"log-level"`
	Stack      stack    `yaml:"stack"`
	Interfaces struct {
		VPNKit string `yaml:"vpnkit"`
		QEMU   string `yaml:"qemu"`
		BESS   string `yaml:"bess"`
		Stdio  string `yaml:"stdio"`
		VFKit  string `yaml:"vfkit"`
	} `yaml:"interfaces"`
	Forwards     []socket `yaml:"forwards"`
	PIDFile      string   `yaml:"pid-file"`
	LogFile      string   `yaml:"log-file"`
	Services     string   `yaml:"services"`
	EC2          bool     `yaml:"ec2-metadata-access"`
	Notification string   `yaml:"notification"` // a path, not a URL
}

type socket struct {
	Socket   string `yaml:"socket"`
	Dest     string `yaml:"dest"`
	User     string `yaml:"user"`
	Identity string `yaml:"identity"`
}

type stack struct {
	Debug       bool              `yaml:"debug"`
	CaptureFile string            `yaml:"capture-file"`
	MTU         int               `yaml:"mtu"`
	Subnet      string            `yaml:"subnet"`
	GatewayIP   string            `yaml:"gatewayIP"`
	DeviceIP    string            `yaml:"deviceIP"`
	HostIP      string            `yaml:"hostIP"`
	GatewayMAC  string            `yaml:"gatewayMacAddress"`
	DNS         []zone            `yaml:"dns"`
	Search      []string          `yaml:"dnsSearchDomains"`
	Forwards    map[string]string `yaml:"forwards"` // local to remote; local may begin with udp:
	NAT         map[string]string `yaml:"nat"`
	VirtualIPs  []string          `yaml:"gatewayVirtualIPs"`
	Leases      map[string]string `yaml:"dhcpStaticLeases"`
	VPNKitMACs  map[string]string `yaml:"vpnKitUUIDMacAddresses"`
	EC2         bool              `yaml:"ec2MetadataAccess"`
}

type zone struct {
	Name    string `yaml:"name"`
	Records []struct {
		Name   string  `yaml:"name"`
		IP     string  `yaml:"ip"`
		Regexp *string `yaml:"regexp"`
	} `yaml:"records"`
	DefaultIP string `yaml:"defaultIP"`
}

var unknownField = regexp.MustCompile(`^line (\d+): field (.*) not found in type `)

// parse reads the file. gvproxy takes no notice of settings that it does not know; here there is a warning for each.
func (f *file) parse(text []byte) (warnings []string, err error) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	err = dec.Decode(f)
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	types, ok := errors.AsType[*yaml.TypeError](err)
	if !ok {
		if err != nil {
			err = invalid("configuration: %s", strings.TrimPrefix(err.Error(), "yaml: "))
		}
		return nil, err
	}
	var faults []string
	for _, fault := range types.Errors {
		if m := unknownField.FindStringSubmatch(fault); m != nil {
			warnings = append(warnings, fmt.Sprintf("configuration, line %s: unknown setting %.64s", m[1], m[2]))
			continue
		}
		faults = append(faults, fault)
	}
	if len(faults) > 0 {
		return nil, invalid("configuration, %s", strings.Join(faults, "; "))
	}
	return warnings, nil
}

// check turns the settings into values.
func (f *file) check() (g Gvproxy, err error) {
	g = Gvproxy{LogFile: f.LogFile, PIDFile: f.PIDFile, Notify: f.Notification}
	var warning string
	if g.LogLevel, warning = level(f.LogLevel); warning != "" {
		g.Warnings = append(g.Warnings, warning)
	}
	for _, text := range f.Listen {
		a, err := vsock.Parse(text)
		if err != nil {
			return Gvproxy{}, invalid("listen: %w", err)
		}
		g.Listen = append(g.Listen, a)
	}
	if g.Services, err = optional(f.Services); err != nil {
		return Gvproxy{}, invalid("services: %w", err)
	}
	if g.Hypervisors, err = f.hypervisors(); err != nil {
		return Gvproxy{}, err
	}
	if g.Network, err = f.Stack.check(); err != nil {
		return Gvproxy{}, err
	}
	g.Network.EC2Metadata = f.Stack.EC2 || f.EC2
	g.Network.Debug = f.Stack.Debug || g.LogLevel <= slog.LevelDebug
	g.Warnings = append(g.Warnings, f.Stack.doubts(g.Network)...)
	for _, s := range f.Forwards {
		fwd, err := s.check(g.Network)
		if err != nil {
			return Gvproxy{}, err
		}
		g.Sockets = append(g.Sockets, fwd)
	}
	return g, nil
}

// optional is an address or, for "", none.
func optional(text string) (vsock.Addr, error) {
	if text == "" {
		return vsock.Addr{}, nil
	}
	return vsock.Parse(text)
}

func (f *file) hypervisors() (h Hypervisors, err error) {
	in := f.Interfaces
	switch {
	case in.VPNKit != "" && in.QEMU != "":
		return h, invalid("sockets for both qemu and vpnkit: want one of them")
	case in.VPNKit != "" && in.BESS != "":
		return h, invalid("sockets for both bess and vpnkit: want one of them")
	case in.QEMU != "" && in.BESS != "":
		return h, invalid("sockets for both qemu and bess: want one of them")
	}
	h.Stdio = in.Stdio != ""
	if h.VPNKit, err = optional(in.VPNKit); err != nil {
		return h, invalid("vpnkit: %w", err)
	}
	if h.QEMU, err = optional(in.QEMU); err != nil {
		return h, invalid("qemu: %w", err)
	}
	if h.QEMU.Scheme() == "unix" {
		path, err := socketPath("unix", in.QEMU)
		if err != nil {
			return h, fmt.Errorf("qemu: %w", err)
		}
		h.MustNotExist = append(h.MustNotExist, path)
	}
	for _, s := range []struct {
		name, scheme, text string
		path               *string
	}{
		{"bess", "unixpacket", in.BESS, &h.BESS},
		{"vfkit", "unixgram", in.VFKit, &h.VFKit},
	} {
		if s.text == "" {
			continue
		}
		if *s.path, err = socketPath(s.scheme, s.text); err != nil {
			return h, fmt.Errorf("%s: %w", s.name, err)
		}
		h.MustNotExist = append(h.MustNotExist, *s.path)
	}
	return h, nil
}

// check makes a socket on the host that leads through the VM's SSH server.
func (s socket) check(n Network) (gvproxy.Forward, error) {
	proto, local := gvproxy.Unix, s.Socket
	if scheme, _, isURL := strings.Cut(s.Socket, "://"); isURL && scheme == "npipe" {
		proto = gvproxy.NPipe
	} else if isURL {
		path, err := socketPath("unix", s.Socket)
		if err != nil {
			return gvproxy.Forward{}, fmt.Errorf("forward: %w, or npipe:////./pipe/NAME", err)
		}
		local = path
	}
	if local == "" {
		return gvproxy.Forward{}, invalid("forward to %.128q: it has no socket on the host", s.Dest)
	}
	remote := url.URL{
		Scheme: "ssh-tunnel", User: url.User(s.User), Host: n.Device.String(), Path: s.Dest,
		RawQuery: url.Values{"key": {s.Identity}}.Encode(),
	}
	f, err := gvproxy.ParseForward(proto, local, remote.String())
	if err != nil {
		return gvproxy.Forward{}, invalid("forward of %.128q: %w", s.Socket, err)
	}
	return f, nil
}

// level reads a level as logrus calls them. gvproxy takes what it does not know for info.
func level(text string) (l slog.Level, warning string) {
	switch strings.ToLower(text) {
	case "trace", "debug":
		return slog.LevelDebug, ""
	case "", "info":
		return slog.LevelInfo, ""
	case "warn", "warning":
		return slog.LevelWarn, ""
	case "error", "fatal", "panic":
		return slog.LevelError, ""
	}
	return slog.LevelInfo, fmt.Sprintf("log level %.64q is not known: taken for info", text)
}
