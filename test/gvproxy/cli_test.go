package gvproxy_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A command line is taken by both or by neither, and what is seen of it through the API is the same.
func TestCommandLine(t *testing.T) {
	const strict = "v0.8.9 takes what cannot work"
	for _, tt := range []struct {
		name    string
		args    string // FILE stands for the path of the file, DIR for an empty directory
		file    string
		differs string // why one of the two takes what the other does not; "" if they agree
	}{
		{name: "none"},
		{name: "ssh port", args: "--ssh-port=3022 -mtu 4000"},
		{name: "no ssh port", args: "-ssh-port -1"},
		{name: "low ssh port", args: "-ssh-port 80"},
		{name: "high ssh port", args: "-ssh-port 65536"},
		{name: "octal", args: "-ssh-port 0o5000"},
		{name: "bad number", args: "-mtu x"},
		{name: "negative MTU", args: "-mtu -1"},
		{name: "huge MTU", args: "-mtu 100000", differs: strict},
		{name: "unknown flag", args: "-nope"},
		{name: "help", args: "-h"},
		{name: "arguments", args: "-ssh-port 3022 argument -ssh-port 80"},
		{name: "hypervisors", args: "-listen-qemu unix://DIR/q -listen-vfkit unixgram://DIR/f"},
		{name: "qemu and vpnkit", args: "-listen-qemu unix://DIR/q -listen-vpnkit unix://DIR/v"},
		{name: "bess and vpnkit", args: "-listen-bess unixpacket://DIR/b -listen-vpnkit unix://DIR/v"},
		{name: "bess and qemu", args: "-listen-bess unixpacket://DIR/b -listen-qemu unix://DIR/q"},
		{name: "bess", args: "-listen-bess unix://DIR/b"},
		{name: "vfkit", args: "-listen-vfkit unix://DIR/f"},
		{name: "qemu", args: "-listen-qemu %zz"},
		{name: "not as many of each", args: "-forward-sock DIR/s -forward-dest /b -forward-user c"},

		{name: "empty file", args: "-config FILE", file: "\n"},
		{name: "no YAML", args: "-config FILE", file: "log-level: ["},
		{name: "wrong type", args: "-config FILE", file: "listen: foo"},
		{name: "unknown setting", args: "-config FILE", file: "nope: 1\nstack: {nope: 2}"},
		{name: "twice", args: "-config FILE", file: "log-level: info\nlog-level: info"},
		{name: "unknown level", args: "-config FILE", file: "log-level: loud"},
		{name: "subnet", args: "-config FILE", file: "stack: {subnet: 10.200.0.0/16}"},
		{name: "small subnet", args: "-config FILE", file: "stack: {subnet: 10.200.0.0/30}"},
		{name: "smallest subnet", args: "-config FILE", file: "stack: {subnet: 10.200.0.5/29}"},
		{name: "no subnet", args: "-config FILE", file: "stack: {subnet: x}"},
		{name: "gateway elsewhere", args: "-config FILE", file: "stack: {gatewayIP: 10.200.0.1}", differs: strict},
		{name: "file and flags", args: "-ssh-port 3022 -config FILE -mtu 1400", file: "stack: {mtu: 1300}"},
		{name: "records", args: "-config FILE", file: "stack: {dns: [{name: z., records: [{name: a, ip: '::1'}, {regexp: ^b, ip: 1.2.3.4}], defaultIP: 4.3.2.1}]}"},
		{name: "zone without records", args: "-config FILE", file: "stack: {dns: [{name: z.}]}"},
		{name: "no zones", args: "-config FILE", file: "stack: {dns: []}"},
		{name: "no records", args: "-config FILE", file: "stack: {dns: [{name: z., records: []}]}"},
		{name: "bad record", args: "-config FILE", file: "stack: {dns: [{name: z., records: [{name: a, ip: x}]}]}"},
		{name: "bad expression", args: "-config FILE", file: "stack: {dns: [{name: z., records: [{regexp: '('}]}]}"},
		{name: "forwards", args: "-config FILE", file: "stack: {forwards: {'127.0.0.1:3022': '192.168.127.2:22', 'udp:127.0.0.1:3053': '192.168.127.2:53', ':3080': '192.168.127.3:80'}}"},
		{name: "bad forward", args: "-config FILE", file: "stack: {forwards: {':x': '192.168.127.2:22'}}"},
		{name: "forward to nowhere", args: "-config FILE", file: "stack: {forwards: {':3080': '192.168.127.2'}}"},
		{name: "leases", args: "-config FILE", file: "stack: {dhcpStaticLeases: {192.168.127.9: 5a:94:ef:e4:0c:09}, gatewayMacAddress: 10:11:11:11:11:00}"},
		{name: "no identity", args: "-config FILE", file: "forwards: [{socket: /nonexistent/x, dest: /y, user: u}]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "gvproxy.yaml")
			if err := os.WriteFile(path, []byte(tt.file), 0o600); err != nil {
				t.Fatal(err)
			}
			args := strings.Fields(strings.NewReplacer("FILE", path, "DIR", dir).Replace(tt.args))
			p, refused := startPeer(t, args...)
			if refused != nil && !errors.Is(refused, errEnded) {
				t.Fatal(refused)
			}
			var want []string
			if refused == nil {
				want = answers(t, p.api, shown)
			}
			p.stop()
			o, err := startOurs(t, args...)
			if err != nil && !errors.Is(err, errEnded) {
				t.Fatal(err)
			}
			switch {
			case (err == nil) == (refused == nil) && tt.differs != "":
				t.Errorf("they do not differ any more (%s): gvproxy %v, ours %v", tt.differs, refused, err)
			case (err == nil) != (refused == nil) && tt.differs == "":
				t.Errorf("gvproxy: %v\nours: %v", refused, err)
			case err == nil && refused == nil:
				if diff := cmp.Diff(want, answers(t, o.api, shown)); diff != "" {
					t.Errorf("-gvproxy +ours\n%s", diff)
				}
			}
		})
	}
}

// shown is what a command line can be seen by.
var shown = []call{
	{method: "GET", path: allPath},
	{method: "GET", path: zonesPath},
	{method: "GET", path: "/leases"},
}
