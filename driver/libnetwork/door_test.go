package libnetwork

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/usernet/usernet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	netID = "1bd1f4a5b6a4a3c7d9a0e1c4f6a09b7f1f2b4c8e5d7a6b3c9f0e1d2c3b4a5968"
	epID  = "9f2c7d1e0b3a48569788a6b5c4d3e2f1001122334455667788990aabbccddeef"
	epID2 = "aaaa7d1e0b3a48569788a6b5c4d3e2f1001122334455667788990aabbccddeef"
)

var cmpValues = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// ids writes NET, EP and EP2 out in a body.
var ids = strings.NewReplacer(`"NET"`, `"`+netID+`"`, `"EP"`, `"`+epID+`"`, `"EP2"`, `"`+epID2+`"`)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// post sends a body as dockerd does and returns the status and the answer.
func post(t testing.TB, h http.Handler, method, body string) (int, string) {
	t.Helper()
	r := httptest.NewRequest(http.MethodPost, "http://plugin.moby.localhost/"+method, strings.NewReader(ids.Replace(body)))
	r.Header.Set("Accept", "application/vnd.docker.plugins.v1.2+json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if got := w.Header().Get("Content-Type"); got != contentType {
		t.Errorf("%s: content type %q", method, got)
	}
	return w.Code, w.Body.String()
}

// step is one request of a conversation and its answer.
type step struct {
	method, body string
	want         string // JSON; "" means {}
}

func converse(t *testing.T, h http.Handler, steps []step) {
	t.Helper()
	for i, s := range steps {
		want := s.want
		if want == "" {
			want = "{}"
		}
		status, got := post(t, h, s.method, s.body)
		if status != http.StatusOK {
			t.Errorf("step %d, %s: status %d, %s", i, s.method, status, got)
			continue
		}
		if diff := cmp.Diff(parse(t, ids.Replace(want)), parse(t, got)); diff != "" {
			t.Errorf("step %d, %s: -want +got\n%s", i, s.method, diff)
		}
	}
}

func parse(t testing.TB, text string) (v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return v
}

// What Docker 20.10 sends for: network create -d usernet -o mode=bridge; run -p 127.0.0.1:8080:80; rm -f; network rm.
// It activates the plugin lazily, never asks about the gateway, and joins before there is a sandbox.
func TestDocker20(t *testing.T) {
	d := newFake()
	h := Handler(d, nil, quiet())
	converse(t, h, []step{
		{"Plugin.Activate", ``, `{"Implements":["NetworkDriver"]}`},
		{"NetworkDriver.GetCapabilities", ``, `{"Scope":"local","ConnectivityScope":"local","GwAllocChecker":true}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET","Options":{
			"com.docker.network.enable_ipv6":false,
			"com.docker.network.generic":{"mode":"bridge","com.docker.network.driver.mtu":"1400"}},
			"IPv4Data":[{"AddressSpace":"LocalDefault","Gateway":"172.20.0.1/16","Pool":"172.20.0.0/16","AuxAddresses":{"printer":"172.20.0.9/16","far":"<nil>"}}],
			"IPv6Data":[]}`, ``},
	})
	want := usernet.Network{
		ID:      netID,
		Subnets: []usernet.Subnet{{Prefix: netip.MustParsePrefix("172.20.0.0/16"), Gateway: netip.MustParseAddr("172.20.0.1"), Reserved: []netip.Addr{netip.MustParseAddr("172.20.0.9")}}},
		Options: usernet.Options{Mode: usernet.Bridge, MTU: 1400, ICC: true, Masquerade: true, FastPath: true},
	}
	if diff := cmp.Diff(want, d.networks[netID], cmpValues); diff != "" {
		t.Fatalf("network -want +got\n%s", diff)
	}
	options := `{"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],
		"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"127.0.0.1","HostPort":8080,"HostPortEnd":8080}]}`
	converse(t, h, []step{
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"NET","EndpointID":"EP","Interface":{"Address":"172.20.0.2/16","AddressIPv6":"","MacAddress":""},"Options":` + options + `}`,
			`{"Interface":{"Address":"","AddressIPv6":"","MacAddress":"02:42:00:00:00:01"}}`},
		{"NetworkDriver.Join", `{"NetworkID":"NET","EndpointID":"EP","SandboxKey":"/var/run/docker/netns/0123456789ab","Options":` + options + `}`,
			`{"InterfaceName":{"SrcName":"uc9f2c7d1e0b3a","DstName":"","DstPrefix":"eth"},"Gateway":"172.20.0.1","GatewayIPv6":"","StaticRoutes":null,"DisableGatewayService":false}`},
		{"NetworkDriver.ProgramExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP","Options":` + options + `}`, ``},
		{"NetworkDriver.EndpointOperInfo", `{"NetworkID":"NET","EndpointID":"EP"}`, `{"Value":{}}`},
	})
	ports := []usernet.Port{{Proto: usernet.TCP, HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8080, ContainerPort: 80}}
	if diff := cmp.Diff(ports, d.ports(epID), cmpValues); diff != "" {
		t.Errorf("ports -want +got\n%s", diff)
	}
	if got := d.endpoints[epID].sandbox; got != "/var/run/docker/netns/0123456789ab" {
		t.Errorf("sandbox %q", got)
	}
	gone := []step{
		{"NetworkDriver.RevokeExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP"}`, ``},
		{"NetworkDriver.Leave", `{"NetworkID":"NET","EndpointID":"EP"}`, ``},
		{"NetworkDriver.DeleteEndpoint", `{"NetworkID":"NET","EndpointID":"EP"}`, ``},
		{"NetworkDriver.DeleteNetwork", `{"NetworkID":"NET"}`, ``},
	}
	converse(t, h, gone)
	if n, e := d.state(); len(n)+len(e) != 0 {
		t.Errorf("left: networks %v, endpoints %v", n, e)
	}
	converse(t, h, gone) // again: success
}

// What Docker 28 sends for: network create -d usernet --ipv6; run -P -p 53:53/udp -p 9000-9010:90/sctp --mac-address
// --network name=…,driver-opt=com.docker.network.endpoint.ifname=lan0.
func TestDocker28(t *testing.T) {
	d := newFake()
	h := Handler(d, nil, quiet())
	network := `"Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{}}`
	options := `{"com.docker.network.endpoint.exposedports":null,"com.docker.network.endpoint.ifname":"lan0",
		"com.docker.network.endpoint.macaddress":"AkKsEQAC","com.docker.network.endpoint.dnsservers":["1.1.1.1"],
		"com.docker.network.portmap":[
			{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":0,"HostPortEnd":0},
			{"Proto":17,"IP":"","Port":53,"HostIP":"","HostPort":53,"HostPortEnd":53},
			{"Proto":132,"IP":"","Port":90,"HostIP":"::1","HostPort":9000,"HostPortEnd":9010}]}`
	converse(t, h, []step{
		{"NetworkDriver.GwAllocCheck", `{` + network + `}`, `{"SkipIPv4":false,"SkipIPv6":false}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET",` + network + `,
			"IPv4Data":[{"AddressSpace":"LocalDefault","Gateway":"172.20.0.1/16","Pool":"172.20.0.0/16"}],
			"IPv6Data":[{"AddressSpace":"LocalDefault","Gateway":"fd00:1::1/64","Pool":"fd00:1::/64"}]}`, ``},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"NET","EndpointID":"EP",
			"Interface":{"Address":"172.20.0.2/16","AddressIPv6":"fd00:1::2/64","MacAddress":"02:42:ac:11:00:02"},"Options":` + options + `}`,
			`{"Interface":{"Address":"","AddressIPv6":"","MacAddress":""}}`},
		{"NetworkDriver.Join", `{"NetworkID":"NET","EndpointID":"EP","SandboxKey":"/var/run/docker/netns/0123456789ab","Options":` + options + `}`,
			`{"InterfaceName":{"SrcName":"uc9f2c7d1e0b3a","DstName":"lan0","DstPrefix":"eth"},"Gateway":"172.20.0.1","GatewayIPv6":"fd00:1::1","StaticRoutes":null,"DisableGatewayService":false}`},
		{"NetworkDriver.ProgramExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP","Options":` + options + `}`, ``},
	})
	want := usernet.Endpoint{
		ID: epID, NetworkID: netID, MAC: []byte{2, 0x42, 0xac, 0x11, 0, 2}, IfName: "lan0",
		Addr4: netip.MustParsePrefix("172.20.0.2/16"), Addr6: netip.MustParsePrefix("fd00:1::2/64"),
	}
	if diff := cmp.Diff(want, d.endpoints[epID].Endpoint, cmpValues); diff != "" {
		t.Errorf("endpoint -want +got\n%s", diff)
	}
	ports := []usernet.Port{
		{Proto: usernet.TCP, ContainerPort: 80},
		{Proto: usernet.UDP, HostPort: 53, ContainerPort: 53},
		{Proto: usernet.SCTP, HostIP: netip.MustParseAddr("::1"), HostPort: 9000, HostPortEnd: 9010, ContainerPort: 90},
	}
	if diff := cmp.Diff(ports, d.ports(epID), cmpValues); diff != "" {
		t.Errorf("ports -want +got\n%s", diff)
	}
	// A rollback of a failed start: no Revoke, and Leave twice (29).
	converse(t, h, []step{
		{"NetworkDriver.Leave", `{"NetworkID":"NET","EndpointID":"EP"}`, ``},
		{"NetworkDriver.Leave", `{"NetworkID":"NET","EndpointID":"EP"}`, ``},
		{"NetworkDriver.DeleteEndpoint", `{"NetworkID":"NET","EndpointID":"EP"}`, ``},
	})
	if got := d.ports(epID); got != nil {
		t.Errorf("ports after Leave: %v", got)
	}
}

// What Docker 29 sends when a container gets another network that takes its IPv6 gateway over: the ports again, without a
// Revoke, to be published on IPv4 only. It knows more options than we do.
func TestDocker29(t *testing.T) {
	d := newFake()
	h := Handler(d, nil, quiet())
	portmap := `"com.docker.network.portmap":[
		{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080},
		{"Proto":6,"IP":"","Port":81,"HostIP":"127.0.0.1","HostPort":8081,"HostPortEnd":8081},
		{"Proto":6,"IP":"","Port":82,"HostIP":"::1","HostPort":8082,"HostPortEnd":8082}]`
	converse(t, h, []step{
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET","Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":false,"com.docker.network.generic":null,"com.docker.network.new":{"a":[1]}},
			"IPv4Data":[{"AddressSpace":"LocalDefault","Gateway":"172.20.0.1/16","Pool":"172.20.0.0/16"}],"IPv6Data":null,"Future":true}`, ``},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"NET","EndpointID":"EP","Interface":{"Address":"172.20.0.2/16"},"Options":{"com.docker.network.endpoint.name":"web",` + portmap + `}}`,
			`{"Interface":{"Address":"","AddressIPv6":"","MacAddress":"02:42:00:00:00:01"}}`},
		{"NetworkDriver.ProgramExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP","Options":{` + portmap + `}}`, ``},
		{"NetworkDriver.ProgramExternalConnectivity", `{"NetworkID":"NET","EndpointID":"EP","Options":{"com.docker.network.driver.private.no_proxy_6to4":true,` + portmap + `}}`, ``},
	})
	ports := []usernet.Port{
		{Proto: usernet.TCP, HostPort: 8080, ContainerPort: 80, IPv4Only: true},
		{Proto: usernet.TCP, HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8081, ContainerPort: 81},
	}
	if diff := cmp.Diff(ports, d.ports(epID), cmpValues); diff != "" {
		t.Errorf("ports -want +got\n%s", diff)
	}
}

// An internal network has no gateway, and must not get Docker's either.
func TestInternal(t *testing.T) {
	d := newFake()
	h := Handler(d, nil, quiet())
	converse(t, h, []step{
		{"NetworkDriver.GwAllocCheck", `{"Options":{"com.docker.network.internal":true}}`, `{"SkipIPv4":false,"SkipIPv6":false}`},
		{"NetworkDriver.GwAllocCheck", `{"Options":{"com.docker.network.internal":true,"com.docker.network.generic":{"mode":"bridge","com.docker.network.bridge.inhibit_ipv4":"true"}}}`, `{"SkipIPv4":true,"SkipIPv6":false}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET","Options":{"com.docker.network.internal":true},
			"IPv4Data":[{"Pool":"172.20.0.0/16","Gateway":"172.20.0.1/16"}]}`, ``},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"NET","EndpointID":"EP","Interface":{"Address":"172.20.0.2/16"}}`,
			`{"Interface":{"Address":"","AddressIPv6":"","MacAddress":"02:42:00:00:00:01"}}`},
		{"NetworkDriver.Join", `{"NetworkID":"NET","EndpointID":"EP","SandboxKey":"/run/x"}`,
			`{"InterfaceName":{"SrcName":"uc9f2c7d1e0b3a","DstName":"","DstPrefix":"eth"},"Gateway":"","GatewayIPv6":"","StaticRoutes":null,"DisableGatewayService":true}`},
	})
	if !d.networks[netID].Internal {
		t.Error("the network is not internal")
	}
}

// With --ipam-driver null nobody but us chooses addresses, and Docker is told which.
func TestNullIPAM(t *testing.T) {
	d := newFake()
	h := Handler(d, map[string]string{"mtu": "1400"}, quiet())
	null := `"IPv4Data":[{"AddressSpace":"null","Pool":"0.0.0.0/0"}],"IPv6Data":[{"AddressSpace":"null","Pool":"::/0","Gateway":"<nil>"}]`
	converse(t, h, []step{
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET","Options":{"com.docker.network.enable_ipv6":true,"com.docker.network.generic":{"subnet":"10.200.0.0/24,fd00::/64","gateway":"10.200.0.7"}},` + null + `}`, ``},
		{"NetworkDriver.CreateEndpoint", `{"NetworkID":"NET","EndpointID":"EP","Interface":{}}`,
			`{"Interface":{"Address":"10.200.0.8/24","AddressIPv6":"fd00::2/64","MacAddress":"02:42:00:00:00:01"}}`},
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"other","Options":{"com.docker.network.enable_ipv6":true},` + null + `}`, ``},
	})
	want := []usernet.Subnet{
		{Prefix: netip.MustParsePrefix("10.200.0.0/24"), Gateway: netip.MustParseAddr("10.200.0.7")},
		{Prefix: netip.MustParsePrefix("fd00::/64"), Gateway: netip.MustParseAddr("fd00::1")},
	}
	if diff := cmp.Diff(want, d.networks[netID].Subnets, cmpValues); diff != "" {
		t.Errorf("subnets -want +got\n%s", diff)
	}
	if got := d.networks["other"]; got.Subnets != nil || !got.IPv6 || got.Options.MTU != 1400 {
		t.Errorf("without subnets: %+v", got)
	}
}

// --ipv4=false (28.0).
func TestIPv6Alone(t *testing.T) {
	d := newFake()
	converse(t, Handler(d, nil, quiet()), []step{
		{"NetworkDriver.CreateNetwork", `{"NetworkID":"NET","Options":{"com.docker.network.enable_ipv4":false,"com.docker.network.enable_ipv6":true},"IPv4Data":null,
			"IPv6Data":[{"Pool":"fd00:1::/64","Gateway":"fd00:1::1/64"}]}`, ``},
	})
	want := []usernet.Subnet{{Prefix: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")}}
	if diff := cmp.Diff(want, d.networks[netID].Subnets, cmpValues); diff != "" {
		t.Errorf("subnets -want +got\n%s", diff)
	}
}

// What only swarms ask is answered, and what a starting daemon asks about an endpoint that we do not know.
func TestUneventful(t *testing.T) {
	converse(t, Handler(newFake(), nil, quiet()), []step{
		{"NetworkDriver.AllocateNetwork", `{"NetworkID":"NET","Options":{"a":"b"},"IPv4Data":[{"Pool":"10.0.0.0/24"}],"IPv6Data":null}`, `{"Options":{"a":"b"}}`},
		{"NetworkDriver.FreeNetwork", `{"NetworkID":"NET"}`, ``},
		{"NetworkDriver.DiscoverNew", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.1","Self":true}}`, ``},
		{"NetworkDriver.DiscoverDelete", `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.0.2.1","Self":false}}`, ``},
		{"NetworkDriver.EndpointOperInfo", `{"NetworkID":"NET","EndpointID":"EP"}`, `{"Value":{}}`},
		{"Plugin.Activate", `ignored`, `{"Implements":["NetworkDriver"]}`},
	})
}

func TestRoutes(t *testing.T) {
	got := joined(usernet.Attachment{
		SrcName: "uc0", DstPrefix: "eth", Gateway6: netip.MustParseAddr("fd00::1"),
		Routes: []usernet.Route{
			{Destination: netip.MustParsePrefix("192.0.2.0/24"), NextHop: netip.MustParseAddr("10.0.0.1")},
			{},
			{Destination: netip.MustParsePrefix("10.0.0.1/32")},
		},
	})
	want := JoinResponse{
		InterfaceName: &InterfaceName{SrcName: "uc0", DstPrefix: "eth"}, GatewayIPv6: "fd00::1",
		StaticRoutes: []StaticRoute{{"192.0.2.0/24", 0, "10.0.0.1"}, {"10.0.0.1/32", 1, ""}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestConcurrent(t *testing.T) {
	d := newFake()
	srv := httptest.NewServer(Handler(d, nil, quiet()))
	defer srv.Close()
	send := func(method, body string) {
		res, err := srv.Client().Post(srv.URL+"/NetworkDriver."+method, "", strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		defer res.Body.Close()
		if text, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusOK || bytes.Contains(text, []byte("Err")) {
			t.Errorf("%s: %s %s %v", method, res.Status, text, err)
		}
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			n := fmt.Sprintf("net%d", i)
			send("CreateNetwork", fmt.Sprintf(`{"NetworkID":%q,"IPv4Data":[{"Pool":"10.%d.0.0/16","Gateway":"10.%d.0.1/16"}]}`, n, i, i))
			for j := range 5 {
				both := fmt.Sprintf(`"NetworkID":%q,"EndpointID":"ep%d-%d"`, n, i, j)
				send("CreateEndpoint", fmt.Sprintf(`{%s,"Interface":{"Address":"10.%d.0.%d/16"}}`, both, i, j+2))
				send("Join", fmt.Sprintf(`{%s,"SandboxKey":"/run/netns/x"}`, both))
				send("ProgramExternalConnectivity", fmt.Sprintf(`{%s}`, both))
				send("Leave", fmt.Sprintf(`{%s}`, both))
				send("DeleteEndpoint", fmt.Sprintf(`{%s}`, both))
			}
			send("DeleteNetwork", fmt.Sprintf(`{"NetworkID":%q}`, n))
		})
	}
	wg.Wait()
	if n, e := d.state(); len(n)+len(e) != 0 {
		t.Errorf("left: networks %v, endpoints %v", n, e)
	}
}
