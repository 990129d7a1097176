package cli

import (
	"errors"
	"log/slog"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/driver/gvproxy"
	"github.com/usernet/usernet/vsock"
)

// withFile parses a command line whose file is text.
func withFile(text string, args ...string) (Gvproxy, error) {
	return ParseGvproxy(append([]string{"-config", "gvproxy.yaml"}, args...), func(path string) ([]byte, error) {
		if path != "gvproxy.yaml" {
			return nil, errors.New("read " + path)
		}
		return []byte(text), nil
	})
}

// whole has every setting that gvproxy knows.
const whole = `
listen:
  - unix:///a.sock
  - vsock://:1024
log-level: Warning
services: unix:///s.sock
interfaces:
  qemu: unix:///q.sock
  vfkit: unixgram:///f.sock
  stdio: accept
forwards:
  - {socket: /api.sock, dest: /run/podman.sock, user: core, identity: /key}
pid-file: /pid
log-file: /log
ec2-metadata-access: false
notification: /n.sock
stack:
  debug: true
  capture-file: c.pcap
  mtu: 4000
  subnet: 10.0.0.0/16
  gatewayIP: 10.0.0.10
  deviceIP: 10.0.0.20
  hostIP: 10.0.0.30
  gatewayMacAddress: 10:11:11:11:11:00
  dns:
    - name: crc.testing.
      records:
        - {name: host, ip: 10.0.0.30}
        - {regexp: "^app", ip: "fd00::1"}
        - {name: no-address}
      defaultIP: 10.0.0.20
    - name: empty.
  dnsSearchDomains: [a.example, b.example]
  forwards:
    udp:127.0.0.1:53: 10.0.0.20:53
    ":80": 10.0.0.20:80
  nat:
    10.0.0.30: 127.0.0.1
    10.0.0.31: 192.0.2.1
  gatewayVirtualIPs: [10.0.0.30, 10.0.0.31]
  dhcpStaticLeases:
    10.0.0.20: 5a:94:ef:e4:0c:ee
  vpnKitUUIDMacAddresses:
    C3D68012-0208-11EA-9FD7-F2189899AB08: 5a:94:ef:e4:0c:ee
  ec2MetadataAccess: true
`

func wholeValue(t *testing.T) Gvproxy {
	return Gvproxy{
		Listen:   []vsock.Addr{at(t, "unix:///a.sock"), at(t, "vsock://:1024")},
		Services: at(t, "unix:///s.sock"),
		LogLevel: slog.LevelWarn, LogFile: "/log", PIDFile: "/pid", Notify: "/n.sock",
		Hypervisors: Hypervisors{
			QEMU: at(t, "unix:///q.sock"), VFKit: "/f.sock", Stdio: true, MustNotExist: []string{"/q.sock", "/f.sock"},
		},
		Network: Network{
			MTU: 4000, Subnet: netip.MustParsePrefix("10.0.0.0/16"),
			Gateway: addr("10.0.0.10"), Device: addr("10.0.0.20"), Host: addr("10.0.0.30"),
			GatewayMAC: gvproxy.MAC{0x10, 0x11, 0x11, 0x11, 0x11, 0},
			VirtualIPs: []netip.Addr{addr("10.0.0.30"), addr("10.0.0.31")},
			NAT:        map[netip.Addr]netip.Addr{addr("10.0.0.30"): addr("127.0.0.1"), addr("10.0.0.31"): addr("192.0.2.1")},
			Leases:     map[netip.Addr]gvproxy.MAC{addr("10.0.0.20"): deviceHW},
			VPNKitMACs: map[string]gvproxy.MAC{"c3d68012-0208-11ea-9fd7-f2189899ab08": deviceHW},
			Zones: []gvproxy.Zone{
				{Name: "crc.testing.", Default: addr("10.0.0.20"), Records: []gvproxy.Record{
					{Name: "host", Addr: addr("10.0.0.30")},
					{Pattern: regexp.MustCompile("^app"), Addr: addr("fd00::1")},
					{Name: "no-address"},
				}},
				{Name: "empty."},
			},
			Search: []string{"a.example", "b.example"},
			Forwards: []gvproxy.Forward{
				forward(t, gvproxy.TCP, ":80", "10.0.0.20:80"), forward(t, gvproxy.UDP, "127.0.0.1:53", "10.0.0.20:53")},
			EC2Metadata: true, Capture: "c.pcap", Debug: true,
		},
		Sockets: []gvproxy.Forward{forward(t, gvproxy.Unix, "/api.sock", "ssh-tunnel://core@10.0.0.20/run/podman.sock?key=%2Fkey")},
	}
}

func TestFile(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       Gvproxy
	}{
		{"whole", whole, wholeValue(t)},
		{"empty", "", filed(nil)},
		{"a comment", "# nothing\n", filed(nil)},
		{"null", "stack:\ninterfaces:\nlisten:\n", filed(nil)},
		{"subnet alone", "stack: {subnet: 10.0.0.0/16}", filed(func(g *Gvproxy) {
			subnet(g, "10.0.0.0/16", "10.0.0.1", "10.0.0.2", "10.0.255.254")
		})},
		{"level", "log-level: trace", filed(func(g *Gvproxy) { g.LogLevel, g.Network.Debug = slog.LevelDebug, true })},
		{"metadata, at the top", "ec2-metadata-access: true", filed(func(g *Gvproxy) { g.Network.EC2Metadata = true })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := withFile(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, values); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// Flags and a file that both say something.
func TestPrecedence(t *testing.T) {
	for _, tt := range []struct {
		name string
		args string
		want func(g *Gvproxy)
	}{
		{"none", "", nil},
		{"flags replace", "-listen tcp://127.0.0.1:1 -services unix:///other -debug -log-file /l -pid-file /p -mtu 1300 " +
			"-notification unix:///m.sock -listen-qemu tcp://127.0.0.1:2 -listen-vfkit unixgram:///g.sock",
			func(g *Gvproxy) {
				g.Listen, g.Services = []vsock.Addr{at(t, "tcp://127.0.0.1:1")}, at(t, "unix:///other")
				g.LogLevel, g.LogFile, g.PIDFile, g.Notify = slog.LevelDebug, "/l", "/p", "/m.sock"
				g.Hypervisors = Hypervisors{QEMU: at(t, "tcp://127.0.0.1:2"), VFKit: "/g.sock", Stdio: true, MustNotExist: []string{"/g.sock"}}
				g.Network.MTU = 1300
			}},
		{"the file's addresses stay", "-subnet 10.9.0.0/16 -gatewayIP 10.9.0.1 -deviceIP 10.9.0.2 -hostIP 10.9.0.3", nil},
		{"sockets are added", "-forward-sock /b.sock -forward-dest /b -forward-user u -forward-identity /k", func(g *Gvproxy) {
			g.Sockets = append(g.Sockets, forward(t, gvproxy.Unix, "/b.sock", "ssh-tunnel://u@10.0.0.20/b?key=%2Fk"))
		}},
		{"idle", "-ssh-port 5 -pcap p.pcap", func(g *Gvproxy) {
			g.Warnings = []string{
				"-ssh-port means nothing with -config: stack.forwards is the place for it",
				"-pcap means nothing with -config: stack.capture-file is the place for it",
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := withFile(whole, strings.Fields(tt.args)...)
			if err != nil {
				t.Fatal(err)
			}
			want := wholeValue(t)
			if tt.want != nil {
				tt.want(&want)
			}
			if diff := cmp.Diff(want, got, values); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}

	t.Run("a silent file", func(t *testing.T) {
		got, err := withFile("log-level: info", "-subnet", "10.9.0.0/16", "-hostIP", "10.9.0.3")
		want := filed(func(g *Gvproxy) { subnet(g, "10.9.0.0/16", "10.9.0.1", "10.9.0.2", "10.9.0.3") })
		if diff := cmp.Diff(want, got, values); diff != "" || err != nil {
			t.Errorf("%v, -want +got\n%s", err, diff)
		}
	})
}

// What gvproxy takes without a word is taken, with one.
func TestWarnings(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []string
	}{
		{"log-level: loud", []string{`log level "loud" is not known: taken for info`}},
		{"more: 1\nstack:\n  mtu: 1500\n  tcpMaxInFlight: 5\n",
			[]string{"configuration, line 1: unknown setting more", "configuration, line 4: unknown setting tcpMaxInFlight"}},
		{"stack:\n  subnet: 10.0.0.0/16\n  forwards: {\":1\": \"192.168.127.2:22\", \":2\": \"[fd00::2]:2\"}\n  dhcpStaticLeases: {192.168.127.2: 5a:94:ef:e4:0c:ee}\n",
			[]string{"dhcpStaticLeases: 192.168.127.2 is not in 10.0.0.0/16", "forwards: 192.168.127.2 is not in 10.0.0.0/16"}},
	} {
		got, err := withFile(tt.text)
		if err != nil || !slices.Equal(got.Warnings, tt.want) {
			t.Errorf("%q: %v, %q", tt.text, err, got.Warnings)
		}
	}
}

func TestFileRefused(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"log-level: [", "invalid configuration: line 1: did not find expected node content"},
		{"listen: foo", "invalid configuration, line 1: cannot unmarshal !!str `foo` into []string"},
		{"more: 1\nlisten: foo", "invalid configuration, line 2: cannot unmarshal !!str `foo` into []string"},
		{"stack: {mtu: -5}", "invalid mtu -5: want 68 to 65535"},
		{"stack: {subnet: 10.0.0.0/30}", "invalid subnet 10.0.0.0/30: want /29 or larger"},
		{"stack: {gatewayMacAddress: 5a:94}", `gatewayMacAddress: invalid MAC address "5a:94": want six bytes as 5a:94:ef:e4:0c:ee`},
		{"stack: {nat: {192.168.127.254: x}}", `nat of 192.168.127.254: invalid address "x"`},
		{"stack: {nat: {x: 127.0.0.1}}", `nat: invalid address "x"`},
		{"stack: {gatewayVirtualIPs: [x]}", `gatewayVirtualIPs: invalid address "x"`},
		{"stack: {dhcpStaticLeases: {x: 5a:94:ef:e4:0c:ee}}", `dhcpStaticLeases: invalid address "x"`},
		{"stack: {dhcpStaticLeases: {192.168.127.2: x}}",
			`dhcpStaticLeases of 192.168.127.2: invalid MAC address "x": want six bytes as 5a:94:ef:e4:0c:ee`},
		{"stack: {vpnKitUUIDMacAddresses: {a: 00:00:00:00:fe:80:00:00}}",
			`vpnKitUUIDMacAddresses of "a": invalid MAC address "00:00:00:00:fe:80:00:00": want six bytes as 5a:94:ef:e4:0c:ee`},
		{"stack: {dns: [{name: z., defaultIP: x}]}", `dns zone "z.": defaultIP: invalid address "x"`},
		{"stack: {dns: [{name: z., records: [{name: a, ip: fe80::1%eth0}]}]}", `dns zone "z.": record "a": invalid address "fe80::1%eth0"`},
		{"stack: {dns: [{name: z., records: [{regexp: '('}]}]}", "dns zone \"z.\": invalid record: error parsing regexp: missing closing ): `(`"},
		{"stack: {forwards: {':1': '192.168.127.2'}}",
			`invalid forward ":1" to "192.168.127.2": address 192.168.127.2: missing port in address`},
		{"stack: {forwards: {':1': 'name:1'}}", `invalid forward ":1" to "name:1": invalid remote addr`},
		{"forwards: [{dest: /x, user: u, identity: /k}]", `invalid forward to "/x": it has no socket on the host`},
		{"forwards: [{socket: /x, dest: /x, user: u}]", `invalid forward of "/x": key not provided for unix-ssh connection`},
		{"forwards: [{socket: /x, user: u, identity: /k}]", `invalid forward of "/x": remote uri must contain a path to a socket file`},
	} {
		_, err := withFile(tt.text)
		if err == nil || err.Error() != tt.want || !errors.Is(err, usernet.ErrInvalid) {
			t.Errorf("%s: %v, want %s", tt.text, err, tt.want)
		}
	}
}
