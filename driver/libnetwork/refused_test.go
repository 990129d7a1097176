package libnetwork

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/usernet/usernet"
)

// What is refused leaves nothing behind, says one clear sentence, and has the status that makes Docker show it alone.
func TestRefused(t *testing.T) {
	network := func(options, ipv4 string) string {
		return `{"NetworkID":"NET2","Options":{` + options + `},"IPv4Data":[` + ipv4 + `]}`
	}
	endpoint := func(ifc, options string) string {
		return `{"NetworkID":"NET","EndpointID":"EP2","Interface":{` + ifc + `},"Options":{` + options + `}}`
	}
	portmap := func(binding string) string { return endpoint("", `"com.docker.network.portmap":[{`+binding+`}]`) }
	ports := func(options string) string {
		return `{"NetworkID":"NET","EndpointID":"EP","Options":{` + options + `}}`
	}

	for _, tt := range []struct {
		method, body string
		status       int
		want         string // how Err begins
	}{
		{"CreateNetwork", ``, 400, "request is empty"},
		{"DeleteNetwork", ``, 400, "request is empty"},
		{"ProgramExternalConnectivity", ``, 400, "request is empty"},
		{"CreateNetwork", `{`, 400, "malformed request: "},
		{"CreateNetwork", `{} {}`, 400, "malformed request: "},
		{"CreateNetwork", `{"NetworkID":"NET2"} rubbish`, 400, "malformed request: "},
		{"CreateNetwork", `[]`, 400, "malformed request: "},
		{"CreateNetwork", `{"NetworkID":1e999}`, 400, "malformed request: "},
		{"CreateNetwork", `{"Options":` + strings.Repeat("[", 100000), 400, "malformed request: "},
		{"CreateNetwork", `{"NetworkID":"NET2","Options":{"x":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `},"IPv4Data":[{"Pool":"x"}]}`, 200, `invalid pool "x"`},
		{"CreateNetwork", `"` + strings.Repeat("x", maxBody) + `"`, 413, "request is larger than 16777216 bytes"},
		{"CreateNetwork", `null`, 200, `invalid network ID "": want`},
		{"Nonsense", `{}`, 404, `POST "/NetworkDriver.Nonsense": Not Found`},

		{"CreateNetwork", `{"NetworkID":"../../etc"}`, 200, `invalid network ID "../../etc"`},
		{"CreateNetwork", `{"NetworkID":".."}`, 200, `invalid network ID ".."`},
		{"CreateNetwork", `{"NetworkID":"` + strings.Repeat("a", 129) + `"}`, 200, `invalid network ID "aaaa`},
		{"DeleteNetwork", `{"NetworkID":"a/b"}`, 200, `invalid network ID "a/b"`},
		{"CreateEndpoint", `{"NetworkID":"NET","EndpointID":"a b"}`, 200, `invalid endpoint ID "a b"`},
		{"Join", `{"NetworkID":"NET","EndpointID":""}`, 200, `invalid endpoint ID ""`},
		{"Join", `{"NetworkID":"NET","EndpointID":"EP","SandboxKey":"../x"}`, 200, `invalid sandbox key "../x": want an absolute path`},

		{"GwAllocCheck", `{"Options":{"com.docker.network.generic":{"moed":"x"}}}`, 200, `invalid option "moed": unknown; did you mean mode? known are bridge,`},
		{"CreateNetwork", network(`"com.docker.network.generic":{"moed":"x"}`, ``), 200, `invalid option "moed": unknown; did you mean mode?`},
		{"CreateNetwork", network(`"com.docker.network.generic":{"mtu":1500}`, ``), 200, "invalid option com.docker.network.generic: json: cannot unmarshal number"},
		{"CreateNetwork", network(`"com.docker.network.generic":"mtu=1500"`, ``), 200, "invalid option com.docker.network.generic: "},
		{"CreateNetwork", network(`"com.docker.network.internal":"yes"`, ``), 200, "invalid option com.docker.network.internal: "},
		{"CreateNetwork", network(`"com.docker.network.enable_ipv4":7`, ``), 200, "invalid option com.docker.network.enable_ipv4: "},
		{"CreateNetwork", network(`"com.docker.network.enable_ipv6":[]`, ``), 200, "invalid option com.docker.network.enable_ipv6: "},
		{"CreateNetwork", network(`"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{"mtu":"1000"}`, ``), 200, "invalid MTU 1000: IPv6 needs 1280 bytes"},
		{"CreateNetwork", network(``, `{"Pool":"10.0.0.0"}`), 200, `invalid pool "10.0.0.0": want a subnet in CIDR notation`},
		{"CreateNetwork", network(``, `{"Pool":"10.0.0.0/24","Gateway":"gw"}`), 200, `invalid gateway "gw": want an address`},
		{"CreateNetwork", network(``, `{"Pool":"10.0.0.0/24","Gateway":"10.0.1.1/24"}`), 200, "invalid subnet 10.0.0.0/24: gateway 10.0.1.1 is outside"},
		{"CreateNetwork", network(``, `{"Pool":"10.0.0.0/24","AuxAddresses":{"a":"b"}}`), 200, `invalid auxiliary address a "b": want an address`},
		{"CreateNetwork", network(``, `{"Pool":"10.0.0.0/24","AuxAddresses":{"DefaultGatewayIPv4":"10.0.0.9/24"}}`), 200, "invalid auxiliary address DefaultGatewayIPv4: not supported, use --gateway"},
		{"CreateNetwork", network(``, `{"Pool":"10.0.0.0/8"},{"Pool":"10.1.0.0/16"}`), 200, "invalid subnet 10.1.0.0/16: it overlaps 10.0.0.0/8"},
		{"CreateNetwork", network(`"com.docker.network.generic":{"subnet":"10.1.0.0/24"}`, `{"Pool":"172.20.0.0/16"}`), 200,
			"invalid option subnet: the engine chose 172.20.0.0/16; give docker network create --subnet, or --ipam-driver null"},

		{"CreateEndpoint", endpoint(`"Address":"10.0.0.2"`, ``), 200, `invalid address "10.0.0.2": want an IPv4 address in CIDR notation`},
		{"CreateEndpoint", endpoint(`"Address":"fd00::1/64"`, ``), 200, `invalid address "fd00::1/64": want an IPv4`},
		{"CreateEndpoint", endpoint(`"AddressIPv6":"10.0.0.2/24"`, ``), 200, `invalid address "10.0.0.2/24": want an IPv6`},
		{"CreateEndpoint", endpoint(`"AddressIPv6":"::ffff:10.0.0.2/120"`, ``), 200, `invalid address "::ffff:10.0.0.2/120": want an IPv6`},
		{"CreateEndpoint", endpoint(`"Address":"224.0.0.1/24"`, ``), 200, `invalid address "224.0.0.1/24"`},
		{"CreateEndpoint", endpoint(`"MacAddress":"01:00:5e:00:00:01"`, ``), 200, `invalid MAC address "01:00:5e:00:00:01": want the six bytes of one station`},
		{"CreateEndpoint", endpoint(`"MacAddress":"00:00:00:00:00:00"`, ``), 200, `invalid MAC address`},
		{"CreateEndpoint", endpoint(`"MacAddress":"02:00:5e:00:00:01:02:03"`, ``), 200, `invalid MAC address`},
		{"CreateEndpoint", endpoint(``, `"com.docker.network.endpoint.ifname":"a/b"`), 200, `invalid interface name "a/b": '/' cannot be in it`},
		{"CreateEndpoint", endpoint(``, `"com.docker.network.endpoint.ifname":5`), 200, "invalid option com.docker.network.endpoint.ifname: "},
		{"CreateEndpoint", endpoint(``, `"usernet.mtu":"5"`), 200, `invalid option "usernet.mtu": an endpoint has no such option`},
		{"CreateEndpoint", portmap(`"Proto":1,"Port":80`), 200, "invalid port 80: protocol number 1: want 6 (tcp), 17 (udp) or 132 (sctp)"},
		{"CreateEndpoint", portmap(`"Proto":262,"Port":80`), 200, "invalid option com.docker.network.portmap: json: "},
		{"CreateEndpoint", portmap(`"Proto":6,"Port":65616`), 200, "invalid option com.docker.network.portmap: json: "},
		{"CreateEndpoint", portmap(`"Proto":6,"Port":0`), 200, "invalid port 0/tcp: a container has no port 0"},
		{"CreateEndpoint", portmap(`"Proto":6,"Port":80,"HostIP":"localhost"`), 200, `invalid host address "localhost": want an IP address of the host`},
		{"CreateEndpoint", portmap(`"Proto":6,"Port":80,"HostPort":90,"HostPortEnd":89`), 200, "invalid port 90:80/tcp: range 90-89 of the host"},
		{"CreateEndpoint", portmap(`"Proto":6,"Port":80,"HostPort":0,"HostPortEnd":89`), 200, "invalid port 80/tcp: range 0-89 of the host"},

		{"ProgramExternalConnectivity", ports(`"com.docker.network.portmap":{}`), 200, "invalid option com.docker.network.portmap: "},
		{"ProgramExternalConnectivity", ports(`"com.docker.network.driver.private.no_proxy_6to4":"x"`), 200, "invalid option com.docker.network.driver.private.no_proxy_6to4: "},

		{"CreateEndpoint", `{"NetworkID":"none","EndpointID":"EP2"}`, 200, "network none: not found"},
		{"Join", `{"NetworkID":"NET","EndpointID":"EP2"}`, 200, "endpoint " + epID2 + ": not found"},
		// A 404 here would be success to Docker.
		{"ProgramExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP2"}`, 200, "endpoint " + epID2 + ": not found"},
	} {
		t.Run(tt.method+" "+tt.want, func(t *testing.T) {
			d := newFake()
			h := Handler(d, nil, quiet())
			converse(t, h, []step{
				{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET","IPv4Data":[{"Pool":"172.20.0.0/16","Gateway":"172.20.0.1/16"}]}`, ``},
				{"NetworkDriver.CreateEndpoint", `{"NetworkID":"NET","EndpointID":"EP","Interface":{"MacAddress":"02:00:00:00:00:01"}}`,
					`{"Interface":{"Address":"172.20.0.2/16","AddressIPv6":"","MacAddress":""}}`},
				{"NetworkDriver.ProgramExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP","Options":{"com.docker.network.portmap":[{"Proto":6,"Port":80}]}}`, ``},
			})
			status, body := post(t, h, "NetworkDriver."+tt.method, tt.body)
			if status != tt.status {
				t.Errorf("status %d, want %d", status, tt.status)
			}
			answer, ok := parse(t, body).(map[string]any)
			if text, _ := answer["Err"].(string); !ok || !strings.HasPrefix(text, tt.want) {
				t.Errorf("answer\nwant %s…\n got %s", tt.want, body)
			}
			if n, e := d.state(); len(n) != 1 || len(e) != 1 || len(d.ports(epID)) != 1 {
				t.Errorf("changed: networks %v, endpoints %v, ports %v", n, e, d.ports(epID))
			}
		})
	}
}

func TestHTTPMethod(t *testing.T) {
	h := Handler(newFake(), nil, quiet())
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/Plugin.Activate", 405},
		{"PUT", "/NetworkDriver.CreateNetwork", 405},
		{"POST", "/", 404},
		{"POST", "//Plugin.Activate", 404},
		{"POST", "/./Plugin.Activate", 404},
		{"POST", "/IpamDriver.GetCapabilities", 404},
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, strings.NewReader("{}")))
		answer, _ := parse(t, w.Body.String()).(map[string]any)
		if w.Code != tt.want || answer["Err"] == nil {
			t.Errorf("%s %s: %d %s, want %d with Err", tt.method, tt.path, w.Code, w.Body, tt.want)
		}
	}
}

// brokenDriver fails to take anything away.
type brokenDriver struct {
	*fakeDriver
	err error
	ctx context.Context
}

func (d *brokenDriver) DeleteNetwork(ctx context.Context, _ string) error {
	d.ctx = ctx
	return d.err
}
func (d *brokenDriver) DeleteEndpoint(ctx context.Context, _, _ string) error {
	d.ctx = ctx
	return d.err
}
func (d *brokenDriver) Leave(ctx context.Context, _, _ string) error     { d.ctx = ctx; return d.err }
func (d *brokenDriver) Unpublish(ctx context.Context, _, _ string) error { d.ctx = ctx; return d.err }

// Teardown succeeds for what is not there, tells other errors, and is not cut short by an engine that hangs up.
func TestTeardown(t *testing.T) {
	d := &brokenDriver{fakeDriver: newFake()}
	h := Handler(d, nil, quiet())
	for _, method := range []string{"DeleteNetwork", "DeleteEndpoint", "Leave", "RevokeExternalConnectivity"} {
		for _, tt := range []struct {
			err  error
			want string
		}{
			{nil, "{}\n"},
			{fmt.Errorf("endpoint 1: %w", usernet.ErrNotFound), "{}\n"},
			{errors.New("delete link un0: device is busy"), `{"Err":"delete link un0: device is busy"}` + "\n"},
		} {
			d.err, d.ctx = tt.err, nil
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			r := httptest.NewRequest(http.MethodPost, "/NetworkDriver."+method, strings.NewReader(`{"NetworkID":"n","EndpointID":"e"}`)).WithContext(ctx)
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != http.StatusOK || w.Body.String() != tt.want {
				t.Errorf("%s, driver says %v: %d %s, want %s", method, tt.err, w.Code, w.Body, tt.want)
			}
			if d.ctx == nil || d.ctx.Err() != nil {
				t.Errorf("%s: the driver's context is cancelled with the request", method)
			}
		}
	}
}

// Docker's users publish ten thousand ports of a telephone exchange.
func TestManyPorts(t *testing.T) {
	var b strings.Builder
	for p := 10000; p <= 20000; p++ {
		if p > 10000 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"Proto":17,"IP":"","Port":%d,"HostIP":"","HostPort":%d,"HostPortEnd":%d}`, p, p, p)
	}
	options := `"Options":{"com.docker.network.portmap":[` + b.String() + `]}`
	d := newFake()
	converse(t, Handler(d, nil, quiet()), []step{
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET"}`, ``},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"NET","EndpointID":"EP","Interface":{"MacAddress":"02:00:00:00:00:01"},` + options + `}`,
			`{"Interface":{"Address":"","AddressIPv6":"","MacAddress":""}}`},
		{"NetworkDriver.ProgramExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP",` + options + `}`, ``},
	})
	if got := len(d.ports(epID)); got != 10001 {
		t.Errorf("%d ports, want 10001", got)
	}
}
