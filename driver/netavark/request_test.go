package netavark

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/usernet/usernet"
)

// An ordinary user's networks are beside the images, wherever these are.
func TestTakenSubnetsOfAUser(t *testing.T) {
	t.Setenv("_CONTAINERS_USERNS_CONFIGURED", "done")
	home := t.TempDir()
	for _, name := range []string{"XDG_DATA_HOME", "XDG_CONFIG_HOME", "CONTAINERS_STORAGE_CONF"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", home)
	write := func(text string, path ...string) {
		t.Helper()
		file := filepath.Join(append([]string{home}, path...)...)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want ...netip.Prefix) {
		t.Helper()
		if d := cmp.Diff(want, takenSubnets("b"), cmpopts.EquateComparable(netip.Prefix{}), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("-want +got\n%s", d)
		}
	}
	check()
	write(`{"id": "a", "subnets": [{"subnet": "10.1.0.0/24"}]}`, ".local/share/containers/storage/networks/a.json")
	write(`{"id": "b", "subnets": [{"subnet": "10.2.0.0/24"}]}`, ".local/share/containers/storage/networks/b.json")
	write(`garbage`, ".local/share/containers/storage/networks/c.json")
	check(netip.MustParsePrefix("10.1.0.0/24"))
	write("[storage]\ngraphroot = \"$HOME/elsewhere\"\n", ".config/containers/storage.conf")
	write(`{"id": "d", "subnets": [{"subnet": "10.4.0.0/24"}]}`, "elsewhere/networks/d.json")
	check(netip.MustParsePrefix("10.4.0.0/24"))
}

// FuzzRequests reads whatever comes, and what it accepts has to be something that can be asked of the daemon.
func FuzzRequests(f *testing.F) {
	f.Add(`{"container_id": "x", "port_mappings": [{"range": 65535, "container_port": 1}], "network": {"subnets": [{"subnet": ""}, {"gateway": "::"}], "routes": [{}]},
		"network_options": {"static_mac": "AAAA", "static_ips": ["", "::ffff:1.2.3.4"], "interface_name": "eth0"}}`)
	f.Add(`{"container_id": "x", "network": {"labels": {"usernet.": ""}, "options": {"metric": "-1", "isolate": "strict"}, "network_dns_servers": ["::%eth0"]}}`)
	f.Add(`{"container_id": "x", "network": {"subnets": [{"subnet": "::ffff:10.0.0.0/112"}]}, "port_mappings": [{"host_ip": "::", "container_port": 65535, "protocol": ",,SCTP"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		ex, err := decode[exec](strings.NewReader(text))
		if err != nil {
			return
		}
		req, err := attachRequest(ex)
		if err != nil {
			return
		}
		for _, p := range req.Ports {
			if p.ContainerPort == 0 || p.Proto != usernet.TCP && p.Proto != usernet.UDP && p.Proto != usernet.SCTP {
				t.Errorf("port %+v", p)
			}
		}
		if _, err := json.Marshal(req); err != nil {
			t.Error(err)
		}
		if _, err := json.Marshal(prepared(ex.Network, req.Network)); err != nil {
			t.Error(err)
		}
	})
}
