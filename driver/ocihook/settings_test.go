package ocihook

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
)

var web = state{State: specs.State{ID: "web", Status: specs.StateCreating, Pid: 7, Bundle: "/b"}}

func TestWish(t *testing.T) {
	base := map[string]string{"network": "flags", "publish": "80", "mtu": "1400"}
	addr := netip.MustParseAddr
	for _, tt := range []struct {
		name        string
		annotations map[string]string
		hostname    string
		want        control.AttachRequest
	}{
		{
			name: "flags only", hostname: "host",
			want: control.AttachRequest{
				Network:   control.NetworkSpec{ID: networkID("flags"), Name: "flags", Options: map[string]string{"mtu": "1400"}},
				Container: driver.Container{ID: "web", Name: "host"}, Interface: "eth0",
				Ports: []control.Port{{Proto: usernet.TCP, ContainerPort: 80}},
			},
		},
		{
			name: "annotations go first",
			annotations: map[string]string{
				"usernet.network": "n", "usernet.publish": "1.2.3.4:8080:80 9000-9001:90/udp", "usernet.subnet": "10.9.0.0/24, fd00:9::/64",
				"usernet.ip": "10.9.0.9", "usernet.ip6": "fd00:9::9", "usernet.mac": "02-00-00-00-00-09", "usernet.alias": "a, b",
				"usernet.name": "me", "usernet.interface": "net0", "usernet.default_route": "0", "usernet.internal": "true",
				"usernet.mode": "bridge", "usernet.mtu": " 9000 ", "com.example": "x",
			},
			want: control.AttachRequest{
				Network: control.NetworkSpec{
					ID: networkID("n"), Name: "n", Internal: true, IPv6: true,
					Options: map[string]string{"mode": "bridge", "mtu": "9000", "subnet": "10.9.0.0/24, fd00:9::/64"},
				},
				Container: driver.Container{ID: "web", Name: "me", Aliases: []string{"a", "b"}}, Interface: "net0",
				Addresses: []netip.Addr{addr("10.9.0.9"), addr("fd00:9::9")}, MAC: "02:00:00:00:00:09", NoDefault: true,
				Ports: []control.Port{
					{Proto: usernet.TCP, HostIP: addr("1.2.3.4"), HostPort: 8080, ContainerPort: 80},
					{Proto: usernet.UDP, HostPort: 9000, HostPortEnd: 9001, ContainerPort: 90},
				},
			},
		},
		{
			name:        "nothing where an annotation is empty",
			annotations: map[string]string{"usernet.publish": "", "usernet.network": ""},
			want: control.AttachRequest{
				Network:   control.NetworkSpec{ID: networkID("oci"), Name: "oci", Options: map[string]string{"mtu": "1400"}},
				Container: driver.Container{ID: "web", Name: "web"}, Interface: "eth0",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := settingsOf(base, tt.annotations)
			if err != nil {
				t.Fatal(err)
			}
			got, err := s.wish(web, bundle{Hostname: tt.hostname})
			if err != nil {
				t.Fatal(err)
			}
			tt.want.ID, tt.want.Names, tt.want.Prepare = endpointID(web, tt.want.Interface), true, true
			if d := cmp.Diff(tt.want, got.AttachRequest, cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateEmpty()); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
	if base["network"] != "flags" || base["mtu"] != "1400" {
		t.Errorf("the flags have changed: %v", base)
	}
}

func TestEverySettingIsKnownOnce(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range config.Names() {
		seen[name] = true
	}
	for _, s := range Settings {
		if seen[s.Name] || !known(s.Name) || s.About == "" {
			t.Errorf("setting %s", s.Name)
		}
		seen[s.Name] = true
	}
	_, err := settingsOf(nil, map[string]string{"usernet.prot": "x"})
	for name := range seen {
		if err == nil || !strings.Contains(err.Error(), "usernet."+name) {
			t.Errorf("the error does not name usernet.%s: %v", name, err)
		}
	}
}

// What belongs to one container has one ending, and interfaces differ in what link names are made from. The same ID is a container of
// another runtime if the bundle is another one.
func TestEndpointID(t *testing.T) {
	other := web
	other.Bundle = "/c"
	ids := []string{endpointID(web, "eth0"), endpointID(web, "eth1"), endpointID(other, "eth0")}
	names := map[string]bool{}
	for _, id := range ids {
		names[usernet.Endpoint{ID: id}.HostName()] = true
	}
	if len(names) != len(ids) {
		t.Errorf("links %v", names)
	}
	for i, want := range []bool{true, true, false} {
		if got := isOf(web, control.Endpoint{ID: ids[i]}); got != want {
			t.Errorf("endpoint %s is of the container: %t, want %t", ids[i], got, want)
		}
	}
}

func TestResolvText(t *testing.T) {
	own, network := []netip.Addr{netip.MustParseAddr("192.0.2.1")}, []netip.Addr{netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd00::1")}
	search := []string{"a.example", "b.example"}
	for _, tt := range []struct {
		name string
		w    wish
		got  control.Attached
		want string
	}{
		{"the network's", wish{}, control.Attached{DNS: network, Search: search}, "nameserver 10.9.0.1\nnameserver fd00::1\nsearch a.example b.example\n"},
		{"its own", wish{servers: own}, control.Attached{DNS: network, Search: search[:1]}, "nameserver 192.0.2.1\nsearch a.example\n"},
	} {
		if got := resolvText(tt.w, tt.got); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	at := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	hosts := []netip.AddrPort{at("127.0.0.53:53"), at("192.0.2.7:53"), at("[::1]:53"), at("[fe80::1%eth0]:53"), at("192.0.2.8:5353"), at("192.0.2.7:53")}
	if got := reachable(hosts); len(got) != 1 || got[0] != hosts[1].Addr() {
		t.Errorf("of the host's resolvers %v", got)
	}
}

func TestMountsResolver(t *testing.T) {
	for _, tt := range []struct {
		mounts string
		want   bool
	}{
		{`[]`, false},
		{`[{"destination": "/etc/hosts", "source": "/x/hosts"}]`, false},
		{`[{"destination": "/etc//resolv.conf", "source": "/home/me/resolv.conf"}]`, true},
		{`[{"destination": "/etc/resolv.conf", "source": "/run/web2/resolv.conf"}]`, true},
		{`[{"destination": "/etc/resolv.conf", "source": "/run/web/my.conf"}]`, true},
		{`[{"destination": "/etc/resolv.conf", "source": "/run/containers/web/userdata/resolv.conf"}]`, false}, // Podman's
	} {
		var b bundle
		if err := json.Unmarshal([]byte(`{"mounts": `+tt.mounts+`}`), &b); err != nil {
			t.Fatal(err)
		}
		if got := b.mountsResolver("web"); got != tt.want {
			t.Errorf("%s: %t, want %t", tt.mounts, got, tt.want)
		}
	}
}
