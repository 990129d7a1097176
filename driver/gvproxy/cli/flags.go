package cli

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"net/url"
	"strings"

	"github.com/usernet/usernet/driver/gvproxy"
)

// UsageError is a command line that cannot be read, or, with flag.ErrHelp, one that asks for help. Both programs print the text on
// stderr and exit with 2, or 0 for help.
type UsageError struct {
	Err  error
	Text string // with the fault and the list of flags
}

func (e *UsageError) Error() string { return e.Err.Error() }

func (e *UsageError) Unwrap() error { return e.Err }

// parseFlags has Go's package flag read the arguments, because it is what gvproxy uses: -x and --x, -x=v and -x v, and all that
// follows the first argument that is no flag is left out of account.
func parseFlags(fs *flag.FlagSet, args []string) error {
	var text bytes.Buffer
	fs.SetOutput(&text)
	if err := fs.Parse(args); err != nil {
		return &UsageError{err, text.String()}
	}
	return nil
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string { return strings.Join(*l, " ") }

func (l *list) Set(value string) error {
	*l = append(*l, value)
	return nil
}

// flags are the arguments of gvproxy.
type flags struct {
	config, services, subnet, gateway, device, host     string
	vpnkit, qemu, bess, vfkit, stdio                    string
	pidFile, logFile, capture, notification             string
	listen                                              list
	forwardSock, forwardDest, forwardUser, forwardIdent list
	mtu, sshPort                                        int
	debug, ec2, version                                 bool

	sshPortGiven bool
}

func (f *flags) parse(fs *flag.FlagSet, args []string) error {
	fs.StringVar(&f.config, "config", "", "YAML `file` with settings")
	fs.Var(&f.listen, "listen", "`URL` to serve the API at, repeatable: unix:///PATH, tcp://HOST:PORT, vsock://:PORT")
	fs.StringVar(&f.services, "services", "", "`URL` to serve the API without /connect at")
	fs.BoolVar(&f.debug, "debug", false, "log more, and every frame")
	fs.IntVar(&f.mtu, "mtu", 0, "MTU of the network in `bytes` (default 1500)")
	fs.IntVar(&f.sshPort, "ssh-port", defaultSSHPort, "`port` of 127.0.0.1 that leads to port 22 of the VM, 1024 to 65535, or -1")
	fs.StringVar(&f.subnet, "subnet", "", "`CIDR` of the network, /29 or larger (default "+defaultSubnet+")")
	fs.StringVar(&f.gateway, "gatewayIP", "", "`address` of the gateway (default: the first of the subnet)")
	fs.StringVar(&f.device, "deviceIP", "", "`address` of the VM (default: the second)")
	fs.StringVar(&f.host, "hostIP", "", "`address` that leads to the host (default: the last)")
	fs.StringVar(&f.vpnkit, "listen-vpnkit", "", "`URL` to wait for HyperKit at")
	fs.StringVar(&f.qemu, "listen-qemu", "", "`URL` to wait for QEMU at: unix:///PATH or tcp://HOST:PORT")
	fs.StringVar(&f.bess, "listen-bess", "", "`URL` to wait for BESS at: unixpacket:///PATH")
	fs.StringVar(&f.vfkit, "listen-vfkit", "", "`URL` to wait for vfkit at: unixgram:///PATH")
	fs.StringVar(&f.stdio, "listen-stdio", "", "any `value`: the VM is on stdin and stdout")
	fs.Var(&f.forwardSock, "forward-sock", "`path` or URL of a socket that leads to one in the VM by SSH, repeatable with the next three")
	fs.Var(&f.forwardDest, "forward-dest", "its `path` in the VM")
	fs.Var(&f.forwardUser, "forward-user", "`user` to log in as")
	fs.Var(&f.forwardIdent, "forward-identity", "`file` with the key to log in with")
	fs.StringVar(&f.pidFile, "pid-file", "", "`file` for the process ID")
	fs.StringVar(&f.logFile, "log-file", "", "`file` for the log")
	fs.StringVar(&f.capture, "pcap", "", "`file` for all frames, without -config")
	fs.BoolVar(&f.ec2, "ec2-metadata-access", false, "let VMs use link-local addresses: clouds' metadata services")
	fs.StringVar(&f.notification, "notification", "", "`URL` of the socket for notifications: unix:///PATH")
	fs.BoolVar(&f.version, "version", false, "print the version")
	if err := parseFlags(fs, args); err != nil {
		return err
	}
	fs.Visit(func(given *flag.Flag) { f.sshPortGiven = f.sshPortGiven || given.Name == "ssh-port" })
	return nil
}

// idle says which flags mean nothing because there is a file.
func (f *flags) idle() []string {
	var idle []string
	if f.sshPortGiven {
		idle = append(idle, "-ssh-port means nothing with -config: stack.forwards is the place for it")
	}
	if f.capture != "" {
		idle = append(idle, "-pcap means nothing with -config: stack.capture-file is the place for it")
	}
	return idle
}

// over puts the flags over the file's settings.
func (f *flags) over(to *file) error {
	for _, s := range []struct{ from, to *string }{
		{&f.services, &to.Services},
		{&f.logFile, &to.LogFile},
		{&f.pidFile, &to.PIDFile},
		{&f.vpnkit, &to.Interfaces.VPNKit},
		{&f.qemu, &to.Interfaces.QEMU},
		{&f.bess, &to.Interfaces.BESS},
		{&f.vfkit, &to.Interfaces.VFKit},
		{&f.stdio, &to.Interfaces.Stdio},
	} {
		if *s.from != "" {
			*s.to = *s.from
		}
	}
	for _, s := range []struct{ from, to *string }{
		{&f.subnet, &to.Stack.Subnet},
		{&f.gateway, &to.Stack.GatewayIP},
		{&f.device, &to.Stack.DeviceIP},
		{&f.host, &to.Stack.HostIP},
	} {
		if *s.to == "" {
			*s.to = *s.from
		}
	}
	if len(f.listen) > 0 {
		to.Listen = f.listen
	}
	if f.debug {
		to.LogLevel = "debug"
	}
	if f.mtu != 0 {
		to.Stack.MTU = f.mtu
	}
	to.EC2 = to.EC2 || f.ec2
	if f.notification != "" {
		path, err := socketPath("unix", f.notification)
		if err != nil {
			return fmt.Errorf("-notification: %w", err)
		}
		to.Notification = path
	}
	return f.forwards(to)
}

// forwards adds those of -forward-sock and its like.
func (f *flags) forwards(to *file) error {
	n := len(f.forwardSock)
	if n != len(f.forwardDest) || n != len(f.forwardUser) || n != len(f.forwardIdent) {
		return invalid("-forward-sock, -forward-dest, -forward-user and -forward-identity: want as many of each")
	}
	for i, sock := range f.forwardSock {
		to.Forwards = append(to.Forwards, socket{sock, f.forwardDest[i], f.forwardUser[i], f.forwardIdent[i]})
	}
	return nil
}

// defaults are those that gvproxy has only without a file.
func (f *flags) defaults(n *Network) error {
	n.Capture = f.capture
	n.SearchHost = true
	for _, zone := range []string{"containers.internal.", "docker.internal."} {
		n.Zones = append(n.Zones, gvproxy.Zone{Name: zone, Records: []gvproxy.Record{
			{Name: "gateway", Addr: n.Gateway},
			{Name: "host", Addr: n.Host},
		}})
	}
	device, err := mac(deviceMAC)
	if err != nil {
		return err
	}
	n.Leases = map[netip.Addr]gvproxy.MAC{n.Device: device}
	n.VPNKitMACs = map[string]gvproxy.MAC{vpnkitUUID: device}
	switch {
	case f.sshPort == noSSHPort:
		return nil
	case f.sshPort < 1024 || f.sshPort > 65535:
		return invalid("-ssh-port %d: want 1024 to 65535, or -1 for none", f.sshPort)
	}
	ssh, err := gvproxy.ParseForward(gvproxy.TCP, fmt.Sprintf("127.0.0.1:%d", f.sshPort), netip.AddrPortFrom(n.Device, 22).String())
	n.Forwards = []gvproxy.Forward{ssh}
	return err
}

// socketPath takes the path out of SCHEME:///PATH.
func socketPath(scheme, text string) (string, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != scheme || u.Path == "" {
		return "", invalid("socket %.128q: want %s:///PATH", text, scheme)
	}
	return u.Path, nil
}
