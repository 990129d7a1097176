package config

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/usernet/usernet"
)

func TestPorts(t *testing.T) {
	lo4, lo6 := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")
	for _, tt := range []struct {
		spec string
		want []usernet.Port
	}{
		{"80", []usernet.Port{{Proto: usernet.TCP, ContainerPort: 80}}},
		{":80", []usernet.Port{{Proto: usernet.TCP, ContainerPort: 80}}},
		{"0:80", []usernet.Port{{Proto: usernet.TCP, ContainerPort: 80}}},
		{"53/udp", []usernet.Port{{Proto: usernet.UDP, ContainerPort: 53}}},
		{"8080:80", []usernet.Port{{Proto: usernet.TCP, HostPort: 8080, ContainerPort: 80}}},
		{"65535:65535/SCTP", []usernet.Port{{Proto: usernet.SCTP, HostPort: 65535, ContainerPort: 65535}}},
		{"127.0.0.1:8080:80", []usernet.Port{{Proto: usernet.TCP, HostIP: lo4, HostPort: 8080, ContainerPort: 80}}},
		{"127.0.0.1::80", []usernet.Port{{Proto: usernet.TCP, HostIP: lo4, ContainerPort: 80}}},
		{"[::1]:8080:80/tcp", []usernet.Port{{Proto: usernet.TCP, HostIP: lo6, HostPort: 8080, ContainerPort: 80}}},
		{"[::ffff:127.0.0.1]:8080:80", []usernet.Port{{Proto: usernet.TCP, HostIP: lo4, HostPort: 8080, ContainerPort: 80}}},
		{"8000-8010:80", []usernet.Port{{Proto: usernet.TCP, HostPort: 8000, HostPortEnd: 8010, ContainerPort: 80}}},
		{"8000-8000:80", []usernet.Port{{Proto: usernet.TCP, HostPort: 8000, ContainerPort: 80}}},
		{"8000-8001:9000-9001/udp", []usernet.Port{
			{Proto: usernet.UDP, HostPort: 8000, ContainerPort: 9000},
			{Proto: usernet.UDP, HostPort: 8001, ContainerPort: 9001},
		}},
		{"[::1]::9000-9001", []usernet.Port{
			{Proto: usernet.TCP, HostIP: lo6, ContainerPort: 9000},
			{Proto: usernet.TCP, HostIP: lo6, ContainerPort: 9001},
		}},
	} {
		got, err := Ports(tt.spec)
		if err != nil {
			t.Error(err)
			continue
		}
		if diff := cmp.Diff(tt.want, got, cmpValues); diff != "" {
			t.Errorf("Ports(%q) -want +got\n%s", tt.spec, diff)
		}
	}
}

func TestPortsRefused(t *testing.T) {
	syntax := ": want [IP:][HOST[-END]:]CONTAINER[/tcp|udp|sctp], an IPv6 address in brackets"
	for _, tt := range []struct{ spec, want string }{
		{"", `invalid port ""` + syntax},
		{"http", `invalid port "http"` + syntax},
		{"80:", `invalid port "80:"` + syntax},
		{"80/", `invalid port "80/": protocol "": want tcp, udp or sctp`},
		{"80/icmp", `invalid port "80/icmp": protocol "icmp": want tcp, udp or sctp`},
		{"80/tcp/udp", `invalid port "80/tcp/udp": protocol "tcp/udp": want tcp, udp or sctp`},
		{"+80", `invalid port "+80"` + syntax},
		{"65536", `invalid port "65536"` + syntax},
		{"0", `invalid port "0": a container has no port 0`},
		{"80:0", `invalid port "80:0": a container has no port 0`},
		{"0-9:80", `invalid port "0-9:80": the host has no port 0`},
		{"9-8:80", `invalid port "9-8:80": range 9-8 ends before it begins`},
		{"8000-8010:9000-9001", `invalid port "8000-8010:9000-9001": 11 ports of the host for 2 of the container`},
		{"8000:9000-9001", `invalid port "8000:9000-9001": 1 ports of the host for 2 of the container`},
		{"localhost:80:80", `invalid port "localhost:80:80": host address "localhost": want an IP address of the host`},
		{"::1:8080:80", `invalid port "::1:8080:80"` + syntax},
		{"[::1:8080:80", `invalid port "[::1:8080:80"` + syntax},
		{"[127.0.0.1]:8080:80", `invalid port "[127.0.0.1]:8080:80"` + syntax},
		{"[fe80::1%eth0]:8080:80", `invalid port "[fe80::1%eth0]:8080:80": host address "fe80::1%eth0": want an IP address of the host`},
	} {
		_, err := Ports(tt.spec)
		if !errors.Is(err, usernet.ErrInvalid) || err.Error() != tt.want {
			t.Errorf("Ports(%q) error\nwant %s\n got %v", tt.spec, tt.want, err)
		}
	}
}

func TestPort(t *testing.T) {
	got, err := Port("8080:80")
	if want := (usernet.Port{Proto: usernet.TCP, HostPort: 8080, ContainerPort: 80}); err != nil || got != want {
		t.Errorf("Port(8080:80) = %+v, %v, want %+v", got, err, want)
	}
	if _, err := Port("80-81"); !errors.Is(err, usernet.ErrInvalid) {
		t.Errorf("Port(80-81) = %v, want ErrInvalid", err)
	}
}

// What a port says it is called is what it is read from.
func FuzzPorts(f *testing.F) {
	for _, s := range []string{"80", "127.0.0.1::80", "[::1]:8080-8090:80/udp", "8000-8010:9000-9010/sctp", "[::ffff:1.2.3.4]:1:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		ports, err := Ports(spec)
		if err != nil {
			if !errors.Is(err, usernet.ErrInvalid) {
				t.Fatalf("%v does not wrap ErrInvalid", err)
			}
			return
		}
		if len(ports) == 0 {
			t.Fatal("no ports and no error")
		}
		for _, p := range ports[:min(len(ports), 3)] {
			again, err := Port(p.String())
			if err != nil || again != p {
				t.Errorf("%+v is written %s and read back as %+v, %v", p, p, again, err)
			}
		}
	})
}
